"""Search a recipe's space on the cluster this job runs on.

ray job submit --working-dir . -- python jobs/search.py RECIPE OUT
"""

import argparse
import json

import raymerge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a recipe with a search")
    parser.add_argument("out", help="folder to write, on storage that all nodes share")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    arguments = parser.parse_args()
    result = raymerge.search(arguments.recipe, arguments.out, overwrite=arguments.overwrite)
    print(json.dumps(result.facts, indent=2))


if __name__ == "__main__":
    main()
