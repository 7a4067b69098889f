"""The commands ``lie-metric study``, ``lie-metric report`` and ``lie-metric compare``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lie_metric.resampling import Resampling
from lie_metric.study.comparison import compare_runs, write_comparison
from lie_metric.study.engines import ENGINES
from lie_metric.study.report import AXES, write_report
from lie_metric.study.run import run_study
from lie_metric.study.settings import MEASURES, Framing, Settings
from lie_metric.study.store import StudyError
from lie_metric.version import __version__

__all__ = ["main"]

_MODELS = """models:
  resnet50  resnet50.a1_in1k  'vit_*'  'resnet50.*'     timm names and wildcards
  family:resnet                                         every model of a module of timm
  hf-hub:timm/vit_base_patch16_224.augreg_in21k         from the hub
  my_package.models:build  models.py:build              a callable that returns a model
  resnet18@runs/best.ckpt  models.py:build@best.pt      with weights from a checkpoint
  mine=models.py:build@best.pt                          with a name of your own

own models: files are imported as scripts are, with what lies beside them; of a checkpoint only tensors are read, and no
code is run, whatever its hyperparameters are. --family 'mine*=cnn' and --tag 'mine*=augmented' say what they are; the
report takes the same. Models that return an object with `logits`, a mapping or a tuple are measured on its logits,
`out` or first entry; --output pred (a key or attribute), --output 1, or --output file.py:callable choose another one.

data: digits, synthetic, folder:PATH with a folder of images for each class, or a set of torchvision (cifar10, ...).
Each timm model gets its own input size, crop and normalisation; an own model with an attribute `pretrained_cfg` too.
Others get the images as they are, in [0, 1]: grey where all are, else RGB. --input-size, --channels, --mean and --std
hold for every model instead, and with --input-size images are cut alike for all. Models are compared pair by pair where
they see the same images at one size.

engines: --on ray makes a task of each model, on the cluster of RAY_ADDRESS or a running one, else on the cores of this
machine; --resources num_cpus=2 num_gpus=0.5 are options of ray.remote. --on slurm makes an array of jobs by submitit;
--resources timeout_min=60 gpus_per_node=1 slurm_partition=short are its parameters, and cluster=local tries it without
SLURM. All machines see the study's folder and the images. Both need pip install 'lie_metric[study]'.
"""

_RUNS = """runs: folders that a Lightning logger wrote to, with all that is in them. Of each run the monitor's own
<prefix>.jsonl is read, else TensorBoard's files, else metrics.csv; a CSV exported from Weights & Biases or MLflow may
be given by name. The regime is a hyperparameter (--by), a part of the path (--by-regex), or the name of the folder.
"""


def _labels(parser: argparse.ArgumentParser) -> None:
    for name in ("family", "tag"):
        parser.add_argument(
            f"--{name}", nargs="+", default=[], metavar=f"MODELS={name.upper()}", help=f"{name} of models by wildcard"
        )


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    # Names may have equals signs in them, families none.
    pairs = [text.rpartition("=") for text in given]
    wrong = [text for text, (pattern, _, label) in zip(given, pairs, strict=True) if not pattern or not label]
    if wrong:
        raise ValueError(f"`{option}` must be MODELS={option[2:].upper()}, got {wrong[0]!r}. Write e.g. 'cnn-*=plain'.")
    return {pattern: label for pattern, _, label in pairs}


def _resources(given: Sequence[str]) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not name or not sign or not value:
            raise ValueError(f"`--resources` must be NAME=VALUE, got {text!r}. Write e.g. num_gpus=1.")
        try:
            found[name] = int(value)
        except ValueError:
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = value
    return found


def _framing(options: argparse.Namespace) -> Framing:
    size, mean, std = options.input_size, options.mean, options.std
    return Framing(
        None if size is None else tuple(size * 2 if len(size) == 1 else size),
        None if mean is None else tuple(mean),
        None if std is None else tuple(std),
        options.channels,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lie-metric", description="Lie derivatives of many models and runs.")
    parser.add_argument("--version", action="version", version=f"lie-metric {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser(
        "study",
        help="measure models",
        description="Measures models, one row for each model and generator. Start it again to go on.",
        epilog=_MODELS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = study.add_argument
    add("models", nargs="+", metavar="MODELS", help="see below")
    add("--data", required=True, help="see below")
    add("--out", required=True, type=Path, metavar="DIR", help="the study's folder")
    add("--data-root", default=Path("data"), type=Path, help="where torchvision's sets are or go")
    add("--measures", nargs="+", default=list(MEASURES), choices=MEASURES, metavar="NAME", help=", ".join(MEASURES))
    add("--lee-output", default="output", choices=("output", "probabilities", "auto"), help="what lee is of")
    add("--generators", nargs="+", default=["affine"], metavar="NAME", help="names or groups of generators")
    add("--num-images", type=int, default=256, help="images whose Lie derivatives are taken")
    add("--eval-images", type=int, default=1024, help="images of accuracy and consistency")
    add("--layerwise", type=int, nargs="?", const=4, default=0, metavar="IMAGES", help="attribute by type of operation")
    add("--interpolation", default="bspline", help="bspline, cubic, bilinear or fourier")
    add("--padding", default="reflection", help="see lie_metric.Resampling")
    add("--align-corners", action="store_true", help="with bilinear and reflection: the paper's convention")
    add("--input-size", type=int, nargs="+", metavar="N", help="height and width (or one for both), for every model")
    add("--channels", type=int, choices=(1, 3), help="grey or RGB, for every model")
    add("--mean", type=float, nargs="+", metavar="X", help="of values in [0, 1], for every model")
    add("--std", type=float, nargs="+", metavar="X", help="likewise")
    add(
        "--output",
        default="logits",
        help="what of the models' output: a name, a number, file.py:callable, probabilities",
    )
    _labels(study)
    add("--random-weights", action="store_true", help="timm models without pretrained weights")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="wildcards of models to leave out")
    add("--shard", metavar="i/n", help="every n-th model from the i-th; by default what torchrun or SLURM's array says")
    add("--on", default="local", choices=ENGINES, help="this process, tasks of Ray, or jobs of SLURM; see below")
    add("--retries", type=int, default=3, help="how often an engine starts a model again that was lost")
    add("--resources", nargs="+", default=[], metavar="NAME=VALUE", help="what a model needs, in the engine's words")
    add("--retry-failed", action="store_true", help="try models again that failed")
    add("--batch-size", type=int, default=8)
    add("--chunk-size", type=int, default=None, help="tangents at once; smaller takes less memory")
    add("--workers", type=int, default=0, help="processes that read images")
    add("--device", default="auto")
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no progress bar")
    report = commands.add_parser("report", help="merge all shards; tables, one HTML page, and pictures")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--no-pictures", action="store_true", help="no PNGs, which need matplotlib")
    report.add_argument("--x", choices=AXES, help="what errors are drawn against; by default the first that there is")
    report.add_argument("--against", nargs="+", metavar="MODEL", help="pairs.csv of these with all others, not of all")
    _labels(report)
    compare = commands.add_parser(
        "compare",
        help="compare the regimes of trained runs",
        description="Compares regimes of runs that EquivarianceMonitor watched: a table, with --out a page too.",
        epilog=_RUNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = compare.add_argument
    add("paths", nargs="+", type=Path, metavar="RUNS", help="see below")
    add("--by", nargs="+", default=["regime"], metavar="NAME", help="hyperparameters that name the regime")
    add("--by-regex", metavar="REGEX", help="names regimes (and seeds) by the path instead: its groups regime, seed")
    add("--baseline", metavar="REGIME", help="what others are compared with; by default none or baseline")
    add("--measure", nargs="+", default=["relative"], metavar="NAME", help="relative, lee, ... as in the keys")
    add("--level", type=float, default=0.95, help="probability of the intervals")
    add("--loader", type=int, default=0, help="number of the validation loader")
    add("--out", type=Path, metavar="DIR", help="folder for comparison.html, a text and pictures")
    add("--no-pictures", action="store_true", help="no PNGs, which need matplotlib")
    return parser


def _compare(options: argparse.Namespace) -> None:
    found = compare_runs(
        options.paths,
        options.by,
        regex=options.by_regex,
        baseline=options.baseline,
        measures=options.measure,
        level=options.level,
        loader=options.loader,
    )
    sys.stdout.write(f"{found}\n")
    if options.out is not None:
        for path in write_comparison(options.out, found, pictures=not options.no_pictures):
            sys.stdout.write(f"{path}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        0; 1 if the study was stopped, 2 if the command cannot be followed, 3 if models failed.
    """
    options = _parser().parse_args(argv)
    try:
        if options.command == "report":
            for path in write_report(
                options.folder,
                pictures=not options.no_pictures,
                x=options.x,
                against=options.against,
                families=_pairs(options.family, "--family"),
                tags=_pairs(options.tag, "--tag"),
            ):
                sys.stdout.write(f"{path}\n")
            return 0
        if options.command == "compare":
            _compare(options)
            return 0
        settings = Settings(
            options.data,
            options.num_images,
            max(options.eval_images, options.num_images),
            tuple(options.generators),
            tuple(options.measures),
            options.layerwise,
            resampling=Resampling(options.interpolation, options.padding, options.align_corners),
            pretrained=not options.random_weights,
            seed=options.seed,
            lee_output=options.lee_output,
            framing=_framing(options),
            output=options.output,
        )
        counts = run_study(
            options.models,
            options.out,
            settings,
            exclude=options.exclude,
            shard=options.shard,
            on=options.on,
            retries=options.retries,
            resources=_resources(options.resources),
            data_root=options.data_root,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            chunk_size=options.chunk_size,
            retry_failed=options.retry_failed,
            progress=not options.quiet,
            families=_pairs(options.family, "--family"),
            tags=_pairs(options.tag, "--tag"),
        )
    except StudyError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: finished rows are kept; start the same command again to go on.\n")
        return 130
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    sys.stdout.write(f"{told}. Report: lie-metric report {options.out}\n")
    # torchrun takes any other status for the end of all processes, whose models would be lost.
    return 3 if counts["failed"] and "TORCHELASTIC_RUN_ID" not in os.environ else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    known = {"study", "report", "compare", "-h", "--help", "--version"}
    # python -m lie_metric.study MODELS... is the command of that name.
    sys.exit(main(given if given and given[0] in known else ["study", *given]))
