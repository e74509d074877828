"""The recipe of a set of kernels: train, store in 16 bit, measure, write the card, and show what a push would send.

    python hub/publish.py org/model hub/model-h2o org/model-less-h2o --train-data books --train-data news.txt \
        --report prose=novel.txt --budget 39 --license apache-2.0 --train-options="--joint-steps 200"

Each step is a command of less-cache and is printed before it runs. The same command line goes on where the training was
interrupted. Nothing is sent: the last line says how.
"""

import argparse
import shlex
from pathlib import Path

import torch

from less_cache import LESSKernels
from less_cache.cli import app
from less_cache.hub import CONFIG_NAME


def run(*arguments: object) -> None:
    """One command of less-cache, in this process."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ less-cache {shlex.join(words)}", flush=True)
    app(words, standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="base model: folder, .gguf file or Hub id")
    parser.add_argument("folder", type=Path, help="of the set, such as hub/<model>-<policy>")
    parser.add_argument("repo_id", help="where it would be published")
    parser.add_argument("--base-model", help="Hub id of the base model; needed where MODEL is a file or folder")
    parser.add_argument("--train-data", action="append", required=True, help="--data of less-cache train; repeatable")
    parser.add_argument("--report", action="append", required=True, metavar="NAME=FILE", help="text to measure on; repeatable")
    parser.add_argument("--budget", action="append", required=True, help="tokens kept in the measurement; repeatable")
    parser.add_argument("--policy", default="h2o")
    parser.add_argument("--sequences", default=16)
    parser.add_argument("--prompt-length", default=512)
    parser.add_argument("--decoded", default=128)
    parser.add_argument("--license", help="of the base model, such as apache-2.0")
    parser.add_argument("--train-options", default="", help="more options of less-cache train, in one string")
    options = parser.parse_args()

    training = options.folder.with_name(f"{options.folder.name}.training")  # its log and plot are not published
    data = [word for path in options.train_data for word in ("--data", path)]
    if not (training / CONFIG_NAME).exists():
        run(
            "train", options.model, *data, "--output", training, "--policy", options.policy, *shlex.split(options.train_options)
        )

    kernels = LESSKernels.from_pretrained(training)
    kernels.config.base_model = options.base_model or kernels.config.base_model
    kernels.save_pretrained(options.folder, dtype=torch.float16)  # half the bytes; what is measured is what is published

    lengths = ("--sequences", options.sequences, "--prompt-length", options.prompt_length, "--decoded", options.decoded)
    budgets = [word for budget in options.budget for word in ("--budget", budget)]
    reports = []
    for entry in options.report:
        name, _, text = entry.partition("=")
        report = training / f"perplexity-{name}.json"
        measured = ("--kernels", options.folder, "--policy", options.policy, "--data", text)
        run("eval", "perplexity", options.model, *measured, *budgets, *lengths, "--output", report)
        reports += ["--report", f"{name}={report}"]

    licence = ("--license", options.license) if options.license else ()
    run("card", options.folder, *reports, *licence)
    run("verify", options.folder, "--model", options.model)
    run("push", options.folder, options.repo_id, "--dry-run")
    print(f"\nTo publish: less-cache push {options.folder} {options.repo_id}")


if __name__ == "__main__":
    main()
