"""Merge on the cluster this job runs on.

ray job submit --working-dir . -- python jobs/merge.py RECIPE OUT
"""

import argparse

import raymerge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a recipe, ours or mergekit's")
    parser.add_argument("out", help="folder to write, on storage that all nodes share")
    parser.add_argument("--workers", type=int, help="tasks at once; as many as fit by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    arguments = parser.parse_args()
    result = raymerge.merge(arguments.recipe, arguments.out, workers=arguments.workers, overwrite=arguments.overwrite)
    print(f"{result.out}: {result.elapsed_seconds:.1f} s, peak {result.peak_bytes / 1e9:.2f} GB per process")


if __name__ == "__main__":
    main()
