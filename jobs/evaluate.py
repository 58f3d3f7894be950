"""Evaluate a merged checkpoint on the cluster this job runs on.

ray job submit --working-dir . -- python jobs/evaluate.py MODEL RECIPE --experts --workers 4
"""

import argparse

import raymerge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a merged folder, or any checkpoint")
    parser.add_argument("recipe", help="a recipe with evaluation tasks")
    parser.add_argument("--experts", action="store_true", help="measure each expert on its own task too")
    parser.add_argument("--workers", type=int, default=2, help="tasks at once")
    arguments = parser.parse_args()
    found = raymerge.evaluate(arguments.model, arguments.recipe, experts=arguments.experts, workers=arguments.workers)
    print(found.to_json())


if __name__ == "__main__":
    main()
