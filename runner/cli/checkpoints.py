"""Commands about what is saved: `runner checkpoints …`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.cli.common import (
    BundleOption,
    EndpointOption,
    OutputOption,
    RegionOption,
    RunName,
    StoreOption,
    chosen_checkpoint,
    found_run,
    print_json,
    print_rows,
)
from runner.cli.describing import compared, described
from runner.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="What is saved, and whether it is sound.")

Which = Annotated[str, typer.Argument(metavar="latest|best|STEP|NAME")]


@app.command("ls")
def list_checkpoints(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    output: OutputOption = "text",
) -> None:
    """All checkpoints of a run, newest first."""
    from runner.supervisor.lookup import checkpoints_of

    columns = (
        *("name", "step", "epoch", "triggers", "bytes"),
        *("healthy", "validated", "pinned", "created_at"),
    )
    print_rows(
        checkpoints_of(found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)),
        columns,
        output,
    )


@app.command("show")
def show_checkpoint(
    name: RunName,
    which: Annotated[str, typer.Argument(metavar="[latest|best|STEP|NAME]")] = "latest",
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print one SHA-256 over the content, and nothing else.")
    ] = False,
    output: OutputOption = "text",
) -> None:
    """What a checkpoint is, and where it comes from."""
    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    manifest = found.find_checkpoint(which)
    if digest:
        value = found.archive.digest(manifest)
        print_json({"name": manifest.name, "digest": value}) if output == "json" else typer.echo(
            value
        )
        return
    validation = found.archive.validation(manifest.name)
    document = json.loads(manifest.to_json())
    document["validation"] = None if validation is None else validation.to_json()
    if output == "json":
        print_json(document)
        return
    for line in described(document):
        typer.echo(line)


@app.command("diff")
def diff_checkpoints(
    one: Annotated[str, typer.Argument(metavar="RUN[:WHICH]", help="latest, if none is named.")],
    other: Annotated[str, typer.Argument(metavar="RUN[:WHICH]|:WHICH")],
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    tensors: Annotated[
        bool, typer.Option("--tensors/--no-tensors", help="Read and compare the tensors, too.")
    ] = True,
    output: OutputOption = "text",
) -> None:
    """What changed from one checkpoint to another: config, code, data, environment, tensors."""
    from runner.checkpoint.comparing import Side, changed_tensors
    from runner.checkpoint.differences import changed_facts

    def side(text: str, same_run: str) -> Side:
        run, _, which = text.partition(":")
        found = found_run(run or same_run, store, s3_endpoint, s3_region, s3_ca_bundle)
        return Side(found.archive, found.find_checkpoint(which or "latest"))

    sides = side(one, ""), side(other, one.partition(":")[0])
    manifests = [each.manifest for each in sides]
    facts = [asdict(change) for change in changed_facts(*manifests)]
    found = [asdict(tensor) for tensor in changed_tensors(*sides)] if tensors else []
    for tensor in found:
        finite = {k: _json_number(v) for k, v in tensor.items() if isinstance(v, float)}
        tensor |= finite
    names = [f"{each.archive.run_id}:{each.manifest.name}" for each in sides]
    if output == "json":
        print_json({"before": names[0], "after": names[1], "facts": facts, "tensors": found})
        return
    for line in compared(names, facts, found):
        typer.echo(line)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@app.command("verify")
def verify_checkpoints(
    name: RunName,
    which: Annotated[str | None, typer.Argument(metavar="[latest|best|STEP|NAME]")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte.")] = False,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    output: OutputOption = "text",
) -> None:
    """Compare checkpoints with their manifests; exit 1 if one is not sound.

    On S3 the server's own checksums and sizes are compared, and no byte is moved; --deep reads
    everything. A directory keeps no checksums, so there everything is read.
    """
    from runner.supervisor.verification import verify_all, verify_found

    run = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    verdicts = (
        verify_all(run.archive, deep=deep)
        if which is None
        else [verify_found(run.archive, lambda: run.find_checkpoint(which), deep=deep)]
    )
    rows: list[dict[str, Any]] = [
        {
            "name": verdict.name,
            "sound": not verdict.problem,
            "problem": verdict.problem,
            "files": [{**asdict(file), "sound": file.sound} for file in verdict.files],
        }
        for verdict in verdicts
    ]
    if output == "json":
        print_json(rows)
    else:
        files = [{**file, "checkpoint": row["name"]} for row in rows for file in row["files"]]
        print_rows(files, ("checkpoint", "name", "size", "compared", "sound", "problem"), output)
    raise typer.Exit(0 if all(row["sound"] for row in rows) else 1)


@app.command("pin")
def pin_checkpoint(
    name: RunName,
    which: Which,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Keep a checkpoint, whatever the job says about keeping."""
    from runner.supervisor.upkeep import pin

    typer.echo(f"pinned {pin(found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle), which)}")


@app.command("unpin")
def unpin_checkpoint(
    name: RunName,
    which: Which,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Leave a pinned checkpoint to the job's rules again."""
    from runner.supervisor.upkeep import unpin

    typer.echo(
        f"unpinned {unpin(found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle), which)}"
    )


@app.command("gc")
def collect_garbage(
    name: RunName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say it, and delete nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if a supervisor may have the run.")
    ] = False,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    output: OutputOption = "text",
) -> None:
    """Delete the checkpoints that the job's rules do not keep; say why each other one stays."""
    from runner.supervisor.upkeep import clean, plan

    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    fates = plan(found) if dry_run else clean(found, force=force)
    verb = "would go" if dry_run else "deleted"
    rows = [
        {
            "name": fate.name,
            "action": verb if fate.goes else "stays",
            "why": list(fate.why),
            "bytes": fate.nbytes,
        }
        for fate in fates
    ]
    print_rows(rows, ("name", "action", "why", "bytes"), output)


@app.command("export")
def export_checkpoint(
    name: RunName,
    which: Annotated[str | None, typer.Argument(metavar="[latest|best|STEP|NAME]")] = None,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="For a copy of all files.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint.")] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="For what deployment needs, only.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The average of the weights.")] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also as ONNX, compared with torch.")
    ] = False,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Copy a checkpoint's files, every byte verified; or, --to DIR, what deployment needs of it."""
    from runner.supervisor.exporting import export_for_use
    from runner.supervisor.upkeep import export

    chosen = chosen_checkpoint(which, best=best)
    if (folder is None) == (to is None):
        raise UsageError("give either a folder for a copy of all files, or --to DIR")
    if folder is not None and (ema or onnx):
        raise UsageError("--ema and --onnx are for --to DIR")
    run = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    if to is not None:
        manifest = export_for_use(run, chosen, to, ema=ema, onnx=onnx)
        files = sorted(path.name for path in to.expanduser().iterdir())
        typer.echo(f"{manifest.name}: {', '.join(files)} in {to}")
    elif folder is not None:
        manifest = export(run, chosen, folder)
        size = f"{len(manifest.files)} files, {manifest.nbytes} bytes"
        typer.echo(f"{manifest.name}: {size} in {folder}")
