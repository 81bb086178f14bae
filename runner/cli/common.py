"""What the commands share: options by their names, and how facts are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from runner.errors import UsageError

Output = Literal["text", "json"]
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]
StoreOption = Annotated[str | None, typer.Option("--store", help="Where the run's store is.")]
EndpointOption = Annotated[
    str | None, typer.Option("--s3-endpoint", help="The server of an s3:// store.")
]
RegionOption = Annotated[str | None, typer.Option("--s3-region", help="Its region.")]
BundleOption = Annotated[
    Path | None, typer.Option("--s3-ca-bundle", help="The certificates to trust there.")
]
OutputOption = Annotated[Output, typer.Option("-o", "--output", help="How to print facts.")]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("-p", "--param", metavar="K=V", help="Override one of the job's params."),
]
LauncherOption = Annotated[str | None, typer.Option("--launcher", help="How to start the trainer.")]
RunIdOption = Annotated[str | None, typer.Option("--run-id", help="Default: the job's name.")]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="STEP|best|PATH|URL", help="The checkpoint to begin from."),
]
ComponentsOption = Annotated[
    str | None,
    typer.Option("--components", help="Take over only these (a,b); the new run is at step 0."),
]
NewOption = Annotated[bool, typer.Option("--new", help="Start another run of this job.")]
UpdateOption = Annotated[bool, typer.Option("--update", help="Go on with changed values.")]


ImageOption = Annotated[str | None, typer.Option("--image", help="The container's image.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", metavar="gke-spot|eks-spot|aks-spot", help="Spot nodes.")
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Where the run is in a cluster.")
]
ContextOption = Annotated[
    str | None, typer.Option("--context", help="The context in the kubeconfig.")
]


def load(
    job: Path,
    param: list[str] | None,
    launcher: str | None,
    store: str | None,
    *,
    image: str | None = None,
    profile: str | None = None,
    namespace: str | None = None,
) -> Any:
    """The job of a file, with the values of the command line over it."""
    from runner.job import load_job, parse_param

    given = dict(parse_param(text) for text in param or ())
    return load_job(
        job,
        params=given,
        launcher=launcher,
        store=store,
        overrides={
            ("image",): image,
            ("kubernetes", "profile"): profile,
            ("kubernetes", "namespace"): namespace,
        },
    )


def where(
    store: str | None, endpoint: str | None, region: str | None, ca_bundle: Path | None
) -> Any:
    """Where to look for a run."""
    from runner.store import S3Options
    from runner.supervisor.lookup import Where

    if store is None and (endpoint or region or ca_bundle):
        raise UsageError("--s3-endpoint, --s3-region and --s3-ca-bundle need --store s3://…")
    bundle = None if ca_bundle is None else str(ca_bundle.expanduser().resolve())
    return Where(store, S3Options(endpoint=endpoint, region=region, ca_bundle=bundle))


def found_run(
    name: str,
    store: str | None,
    endpoint: str | None,
    region: str | None,
    ca_bundle: Path | None,
) -> Any:
    """The run of this name. UnknownName if there is none."""
    from runner.supervisor.lookup import find_run

    return find_run(name, where(store, endpoint, region, ca_bundle))


def chosen_checkpoint(which: str | None, *, best: bool) -> str:
    """What is meant by a name, by --best, or by neither: the latest one."""
    if best and which is not None:
        raise UsageError("give a checkpoint or --best, not both")
    return "best" if best else which or "latest"


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], output: Output) -> None:
    """A table for people, the whole rows for programs."""
    if output == "json":
        print_json(rows)
        return
    table = [columns, *(tuple(_cell(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
