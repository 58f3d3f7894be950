"""Complete an output folder whose shards are written: config, index, tokenizer, heads' configs, card."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raymerge.checkpoint import model_folder
from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.index import read_json
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.writer import write_text
from raymerge.errors import RecipeError
from raymerge.models import vocabulary
from raymerge.models.chat_templates import CHAT_TEMPLATES
from raymerge.plan.schema import Plan


def finish_folder(plan: Plan, folder: Path, recipe: Mapping[str, Any], name: str) -> None:
    """Write everything but the shards and the run's facts below `folder`. Raises StorageError."""
    model_folder.write_json(folder / "config.json", plan.config)
    shards = {s.file: [t.name for t in s.tensors] for s in plan.shards if not s.is_head}
    total = sum(
        DTYPES[tensor.dtype].itemsize * tensor.num_elements
        for shard in plan.shards
        if shard.file in shards
        for tensor in shard.tensors
    )
    model_folder.write_index(folder, shards, total)
    _write_tokenizer(plan, folder)
    for number in plan.head_experts:
        model = plan.models[number]
        config = read_json(model.location, "config.json", model.location.files())
        model_folder.write_json(folder / model_folder.HEADS / model.name / "config.json", config)
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    write_text(folder / model_folder.RECIPE, text)
    model_folder.write_card(
        folder,
        {
            "name": name,
            "version": plan.version,
            "method": plan.method,
            "models": [{"name": model.name, "place": str(model.location)} for model in plan.models],
            "hub_ids": [model.location.path for model in plan.models if model.location.is_hub],
            "heads": [plan.models[number].name for number in plan.head_experts],
            "recipe": text,
            "notes": plan.notes,
        },
    )


def output_tokenizer(plan: Plan) -> Any:
    """The output's tokenizer: its owner's, with the tokens that are added. Raises CheckpointError."""
    owner = plan.locations[plan.tokenizer.model]
    tokenizer = vocabulary.load_tokenizer(owner, owner.files())
    if not plan.tokenizer.added:
        return tokenizer
    donors = [vocabulary.load_tokenizer(place, place.files()) for place in plan.locations if place != owner]
    return vocabulary.extend_tokenizer(tokenizer, plan.tokenizer.added, donors)


def _write_tokenizer(plan: Plan, folder: Path) -> None:
    owner = plan.locations[plan.tokenizer.model]
    others = [owner, *(location for location in plan.locations if location != owner)]
    model_folder.copy_first(model_folder.GENERATION_FILES, others, folder)
    model_folder.copy_first(model_folder.PROCESSOR_FILES, others, folder)
    if plan.tokenizer.added:
        output_tokenizer(plan).save_pretrained(folder)
    else:
        model_folder.copy_first(model_folder.TOKENIZER_FILES, others, folder)
    if plan.chat_template is not None:
        _write_chat_template(plan, folder)


def _write_chat_template(plan: Plan, folder: Path) -> None:
    template = choose_chat_template(plan.chat_template or "", plan)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        # Where both exist, transformers reads the file; one place is enough.
        content = read_json(Location(str(folder)), config.name, {config.name: 0})
        content.pop("chat_template", None)
        model_folder.write_json(config, content)
    (folder / "chat_template.json").unlink(missing_ok=True)
    write_text(folder / "chat_template.jinja", template)


def choose_chat_template(wanted: str, plan: Plan) -> str:
    """The Jinja text of a recipe's `chat_template`. Raises RecipeError if it means nothing."""
    if wanted == "auto":
        found = [template for location in plan.locations if (template := _template_of(location)) is not None]
        if not found:
            raise RecipeError("output.chat_template: auto, but no model has a chat template")
        return Counter(found).most_common(1)[0][0]
    named = next((model.location for model in plan.models if model.name == wanted), None)
    if named is not None:
        template = _template_of(named)
        if template is None:
            raise RecipeError(f"output.chat_template: {wanted!r} has no chat template")
        return template
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    if len(wanted) >= 20 and "{" in wanted:
        return wanted
    raise RecipeError(
        f"output.chat_template: found {wanted!r}; auto, a model's name, {', '.join(CHAT_TEMPLATES)}, or Jinja text "
        f"is expected"
    )


def _template_of(location: Location) -> str | None:
    files = location.files()
    if "chat_template.jinja" in files:
        return location.local_path("chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if name in files:
            template = read_json(location, name, files).get("chat_template")
            if isinstance(template, str):
                return template
    return None
