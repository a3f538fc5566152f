"""The commands: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click
from click_default_group import DefaultGroup

from mka_export import __version__
from mka_export.errors import MkaError, out_of_memory, printable
from mka_export.interrupt import obeyed
from mka_export.options import (
    CheckOptions,
    CompareOptions,
    ConvertOptions,
    DeviceOptions,
    EvalOptions,
    HealOptions,
    LimitOptions,
    MergeOptions,
    MmluOptions,
    OutputOptions,
    PreviewOptions,
    ServeOptions,
    TextOptions,
    options,
)

EPILOG = "Exit codes: 0 pass, 1 error, 2 usage, 3 parity failed, 4 inconclusive."


class Group(DefaultGroup):  # type: ignore[misc]  # the package has no types
    """A group that shows our errors as one line, and an interrupt as what it is."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with obeyed(_say_how_to_go_on):
                return super().invoke(ctx)
        except MkaError as error:
            click.echo(f"mka-export: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:  # a full disk, a folder that cannot be written
            where = f": {error.filename}" if error.filename else ""
            click.echo(f"mka-export: {error.strerror or error}{where}", err=True)
            sys.exit(1)
        except Exception as error:
            if not out_of_memory(error):
                raise
            click.echo("mka-export: out of memory. Close other programs, or use a machine with more.", err=True)
            sys.exit(1)


def _say_how_to_go_on() -> None:
    again = shlex.join(["mka-export", *sys.argv[1:]])
    click.echo(f"mka-export: interrupted. What was finished is kept; to go on: {again}", err=True)


HELP = """Make a language model shallower, export it, and prove that it still works.

\b
  mka-export smollm2-135m --ratio 0.1 --to gguf-q4
  mka-export llama3-8b --ratio 0.4 --to gguf-q4

MODEL is a name from 'mka-export models', a hub id, a checkpoint folder or a .gguf file.
"""  # \b: click keeps the lines after it apart


@click.group(cls=Group, default="run", default_if_no_args=False, help=HELP, epilog=EPILOG)
@click.version_option(__version__, prog_name="mka-export")
def main() -> None:
    """Answer for ``mka-export``."""


@main.command(epilog=EPILOG)
@click.argument("model")
@options(
    merge=MergeOptions,
    heal=HealOptions,
    convert=ConvertOptions,
    texts=TextOptions,
    limits=LimitOptions,
    mmlu=MmluOptions,
    device=DeviceOptions,
    output=OutputOptions,
    preview=PreviewOptions,
)
def run(model: str, **groups: Any) -> None:
    """Merge layers of MODEL, make every target, measure each against the original (the default command)."""
    from mka_export import pipeline

    sys.exit(pipeline.run(model, **groups))


@main.command()
@click.argument("model")
@options(
    merge=MergeOptions,
    heal=HealOptions,
    texts=TextOptions,
    device=DeviceOptions,
    output=OutputOptions,
    preview=PreviewOptions,
)
def merge(model: str, **groups: Any) -> None:
    """Merge layers of MODEL, write the checkpoint and measure what that lost; prints its folder."""
    from mka_export import pipeline

    sys.exit(pipeline.merge_only(model, **groups))


@main.command(epilog=EPILOG)
@click.argument("model")
@options(
    convert=ConvertOptions,
    texts=TextOptions,
    limits=LimitOptions,
    mmlu=MmluOptions,
    device=DeviceOptions,
    output=OutputOptions,
    preview=PreviewOptions,
)
def convert(model: str, **groups: Any) -> None:
    """Make every target from MODEL as it is, and measure each against it."""
    from mka_export import pipeline

    sys.exit(pipeline.convert_only(model, **groups))


@main.command()
@click.argument("model")
@click.option("--measure", "measures", multiple=True, help="One measure; can be repeated. Default: all of them.")
@options(texts=TextOptions, device=DeviceOptions, output=OutputOptions)
def similarity(model: str, **groups: Any) -> None:
    """Draw how alike all layers of MODEL are, by every measure, and write the matrices; prints their folder."""
    from mka_export import pipeline

    sys.exit(pipeline.similarity(model, **groups))


@main.command()
@click.argument("model")
@options(chosen=CompareOptions, texts=TextOptions, mmlu=MmluOptions, device=DeviceOptions, output=OutputOptions)
def compare(model: str, **groups: Any) -> None:
    """Merge MODEL by every method at several ratios, and measure all on the same tokens; prints a table."""
    from mka_export.pipeline.compare import Compare

    sys.exit(Compare(model, **groups).carry_out())


@main.command(epilog=EPILOG)
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--against", help="The model to compare with: as MODEL elsewhere.")
@options(
    checked=CheckOptions,
    texts=TextOptions,
    mmlu=MmluOptions,
    limits=LimitOptions,
    device=DeviceOptions,
    output=OutputOptions,
)
def check(artifact: Path | None, against: str | None, **groups: Any) -> None:
    """Measure ARTIFACT, any GGUF file or ONNX folder, against a model; or several, which a --config names."""
    from mka_export.pipeline.check import check as measure

    sys.exit(measure(artifact, against, **groups))


@main.command(epilog=EPILOG)
@click.argument("folders", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--merge", is_flag=True, help="Join the shards of one check, one in each OUT, into --out.")
@click.option("--out", type=click.Path(path_type=Path), help="With --merge: output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def report(folders: tuple[Path, ...], merge: bool, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Write the reports in output folder OUT anew, from what was measured."""
    from mka_export.pipeline.reports import join, renew

    if merge:
        sys.exit(join(folders, out, as_json=as_json, quiet=quiet))
    sys.exit(renew(folders, out, as_json=as_json, quiet=quiet))


@main.command("eval")
@click.argument("out_or_artifact", type=click.Path(path_type=Path))
@options(chosen=EvalOptions, device=DeviceOptions, output=OutputOptions)
def evaluate(out_or_artifact: Path, **groups: Any) -> None:
    """Evaluate artifacts, and the model they came from, on tasks of lm-evaluation-harness; prints a table.

    OUT_OR_ARTIFACT is an output folder (all its artifacts), a .gguf file or an ONNX folder.
    """
    from mka_export.pipeline.evaluation import evaluate as run_tasks

    sys.exit(run_tasks(out_or_artifact, **groups))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what is wrong as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def verify(folder: Path, as_json: bool, quiet: bool) -> None:
    """Check every published file in output FOLDER against its manifest."""
    import json

    from mka_export.progress import Progress
    from mka_export.verify import verify as check_files

    count, findings = check_files(folder, Progress(quiet=quiet))
    if as_json:
        click.echo(json.dumps({"files": count, "findings": [vars(f) for f in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.state}  {printable(finding.file)}")
        click.echo(
            f"{count} files, " + (f"{len(findings)} not as they were made" if findings else "all as they were made")
        )
    sys.exit(1 if findings else 0)


@main.command()
@click.argument("out", required=False, type=click.Path(path_type=Path))
@options(chosen=ServeOptions)
def serve(out: Path | None, **groups: Any) -> None:
    """Serve a page on which the artifacts in OUT are talked to in a browser.

    OUT is an output folder, a .gguf file or an ONNX folder. Models run on the device that shows the page.
    """
    from mka_export.serve import serve as serve_page

    sys.exit(serve_page(out, **groups))


@main.command()
@click.argument("model", required=False)
@click.option("--ratio", type=float, help="Share of layers to remove.")
@click.option("--to", multiple=True, help="Target to make. Can be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def doctor(model: str | None, ratio: float | None, to: tuple[str, ...], as_json: bool) -> None:
    """Say what is installed and usable, and what MODEL will take, before anything is fetched."""
    from mka_export import pipeline

    sys.exit(pipeline.doctor(model, ratio, to, as_json=as_json))


@main.command()
def models() -> None:
    """List the short names of models."""
    from mka_export.report.listing import print_models

    print_models()


@main.command()
@click.option("--for", "model", metavar="MODEL", help="Say what each would be for this model, and whether it can be.")
@click.option("--json", "as_json", is_flag=True, help="Print that as JSON.")
def targets(model: str | None, as_json: bool) -> None:
    """List the targets."""
    from mka_export.errors import UsageError
    from mka_export.report.listing import print_offers, print_targets

    if model is None:
        if as_json:
            raise UsageError("--json is for a model", "Name it with --for.")
        print_targets()
        return
    from mka_export.pipeline.offers import offers
    from mka_export.report import print_json

    found = [offer.to_dict() for offer in offers(model)]
    if as_json:
        print_json(found)
    else:
        print_offers(found)
