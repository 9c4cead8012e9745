"""``torchweld ffcv convert``, ``torchweld ffcv inspect`` and ``torchweld ffcv doctor``.

Importing this module is light; numpy and torch come when a command runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchweld.errors import TorchweldError

if TYPE_CHECKING:
    from torchweld_ffcv.beton import Beton
    from torchweld_ffcv.conversion import Converted


@click.command(name="convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Processes; as many as cores otherwise.")
@click.option("--store", type=click.Choice(["auto", "jpeg", "raw"]), help="How pictures are kept.")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEG that has to be encoded.")
@click.option("--max-side", type=click.IntRange(1), help="Shrink larger pictures to these pixels.")
@click.option("--skip-bad", is_flag=True, help="Leave out samples that cannot be read or stored.")
@click.option("--allow-random", is_flag=True, help="Accept samples that differ at each reading.")
@click.option("--progress/--no-progress", default=None, help="A bar; on a terminal by default.")
def convert_command(  # noqa: PLR0917 - click passes keywords
    source: str,
    target: Path,
    workers: int | None,
    store: str | None,
    quality: int | None,
    max_side: int | None,
    skip_bad: bool,
    allow_random: bool,
    progress: bool | None,
) -> None:
    """Write a dataset as one .beton file.

    \b
    torchweld ffcv convert imagenet/train train.beton
    torchweld ffcv convert mypackage.data:train_set train.beton

    SOURCE is a folder with one folder of images for each class, or a dataset (or a function that
    makes one) as package.module:object. JPEG files keep their bytes.
    """  # noqa: D301 - click reads the character
    pictures = {"store": store, "quality": quality, "max_side": max_side}
    chosen = {name: value for name, value in pictures.items() if value is not None}
    bar = sys.stderr.isatty() if progress is None else progress
    try:
        done = _convert(
            source,
            target,
            chosen,
            workers=workers,
            skip_bad=skip_bad,
            allow_random=allow_random,
            progress=bar,
        )
    except TorchweldError as error:
        raise click.ClickException(str(error)) from None
    for index, reason in done.skipped[:10]:
        click.echo(f"left out sample {index}: {reason}", err=True)
    more = f", {len(done.skipped)} left out" if done.skipped else ""
    rate = done.num_samples / max(done.seconds, 1e-9)
    click.echo(
        f"{done.path}: {done.num_samples:,} samples{more}, {done.num_bytes:,} bytes, "
        f"{done.seconds:.1f} s ({rate:,.0f} samples/s)"
    )


@click.command(name="inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Read all of it and compare its checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
@click.pass_context
def inspect_command(ctx: click.Context, file: Path, full: bool, as_json: bool) -> None:
    """Show what is in a .beton file, and whether it is intact.

    Exits with 1 when it is damaged.
    """
    from torchweld_ffcv.beton import read_beton, verify

    try:
        beton = read_beton(file)
        if full:
            verify(beton)
    except TorchweldError as error:
        if as_json:
            click.echo(json.dumps({"path": str(file), "damage": str(error)}, indent=2))
            ctx.exit(1)
        raise click.ClickException(str(error)) from None
    report = _report(beton, full=full)
    click.echo(json.dumps(report, indent=2) if as_json else _text(report))


def _convert(source: str, target: Path, pictures: dict[str, Any], **wishes: Any) -> Converted:
    from torchweld_ffcv.conversion import Wishes, convert_source
    from torchweld_ffcv.sources import as_source, load_object

    if ":" in source and not Path(source).exists():
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`: the user's own module
        given = load_object(source)
    else:
        given = source
    return convert_source(as_source(given), target, Wishes(pictures=pictures, **wishes))


def _report(beton: Beton, *, full: bool) -> dict[str, Any]:
    data = {} if beton.manifest is None else beton.manifest.data
    return {
        "path": str(beton.path),
        "num_samples": beton.num_samples,
        "num_bytes": beton.num_bytes,
        "page_bytes": beton.page_bytes,
        "fields": [
            {name: value for name, value in vars(field).items() if value not in (None, "", ())}
            for field in beton.fields
        ],
        "written_by": data.get("versions"),
        "source": data.get("source"),
        "fingerprint": beton.fingerprint,
        "num_skipped": data.get("num_skipped", 0),
        "skipped": data.get("skipped", []),
        "checked": "every byte" if full else "header and tables",
    }


def _text(report: dict[str, Any]) -> str:
    writer = report["written_by"]
    by = f"torchweld-ffcv {writer['torchweld-ffcv']}" if writer else "FFCV's own writer"
    size = f"{report['num_bytes']:,} bytes, pages of {report['page_bytes'] >> 20} MiB"
    lines = [
        f"{report['path']}   {report['num_samples']:,} samples, {size}",
        f"written by {by}" + (f" from {report['source']}" if report["source"] else ""),
        *(f"  {_field_text(field)}" for field in report["fields"]),
        *(f"  left out: sample {index}: {why}" for index, why in report["skipped"][:10]),
        f"{report['checked']} sound",
    ]
    return "\n".join(lines)


def _field_text(field: dict[str, Any]) -> str:
    shape = f"{field['dtype']} {field['shape']}" if "shape" in field else field.get("dtype", "")
    classes = ", ".join(field.get("classes", ()))
    return "   ".join(filter(None, [field["name"], field["kind"], shape, classes]))
