"""The command line: ``mpkernels info | validate | bench | demo | view | report``. Arguments only: see commands/.

Exit status: 0 all is well, 1 something is wrong (a failing check, a backend that was named and cannot run),
2 bad usage, 130 interrupted with Ctrl-C (after printing what was done so far).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mpkernels.commands import terminal


class _Group(TyperGroup):
    """Commands return their exit status; bad usage is one line on standard error."""

    def main(self, *args: Any, **settings: Any) -> Any:
        settings["standalone_mode"] = False
        try:
            status = super().main(*args, **settings)
        except terminal.UsageError as error:
            status = _bad_usage(str(error))
        except Exception as error:
            if not hasattr(error, "format_message"):  # all of click's own errors have it
                raise
            status = _bad_usage(error.format_message())
        sys.exit(status or terminal.OK)


def _bad_usage(message: str) -> int:
    sys.stderr.write(f"mpkernels: {' '.join(message.split())}\n")
    return terminal.BAD_USAGE


app = typer.Typer(
    cls=_Group,
    help="Hand-written kernels for machine perception: what runs here, whether it is right, how fast it is.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Ops = Annotated[list[str] | None, typer.Argument(help="Ops, by name; all if none is named.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default=False)]
Output = Annotated[Path, typer.Option(help="Folder of results and pictures.")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import mpkernels

        typer.echo(mpkernels.__version__)
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def info(
    kernels: Annotated[bool, typer.Option("--kernels", help="Registers, shared memory and spills too.")] = False,
    json: Json = False,
) -> int:
    """Versions, this machine, and which backend runs which op, with the reason for each hole."""
    from mpkernels.commands import info as command

    return command.run(kernels=kernels, as_json=json)


@app.command()
def validate(
    ops: Ops = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Check this backend alone (repeatable).", show_default=False)
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, float64, bfloat16 or float16 (repeatable); all if none.", show_default=False),
    ] = None,
    implementation: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Check this function instead of ours; it gets the arguments of an op by name and returns its outputs"
            " in order. Found in the current directory too. float32 unless --dtype says more.",
            show_default=False,
        ),
    ] = None,
    cases: Annotated[str, typer.Option(help="Only cases whose name contains this.", show_default=False)] = "",
    device: Device = None,
    backward: Annotated[bool, typer.Option("--backward/--no-backward", help="Compare gradients too.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Write validation.json into this folder, for the report.", show_default=False)
    ] = None,
    json: Json = False,
) -> int:
    """Compare ops with float64 on every backend that exists here; exit status 1 if one is out of its bound.

    Triton runs on a machine without a GPU too, in its interpreter.
    """
    from mpkernels.commands import validate as command
    from mpkernels.commands.plan import Request

    request = Request(ops or (), backend or (), dtype or (), implementation, cases, device, backward)
    return command.run(request, as_json=json, output=output)


@app.command()
def bench(
    ops: Ops = None,
    workload: Annotated[str, typer.Option(help="Only workloads whose name contains this.", show_default=False)] = "",
    repeats: Annotated[
        int | None, typer.Option(help="Rounds; as many as fit into three seconds if not given.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch's threads.", show_default=False)] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Device = None,
    record: Annotated[bool, typer.Option("--record", help="Write benchmarks/results/<machine>/<op>.json.")] = False,
    json: Json = False,
) -> int:
    """Time ops beside eager and compiled torch, in turn in one process: medians of paired ratios.

    forward runs without gradients. forward+backward takes the gradients of the first two differentiable arguments
    (densities and values; not of positions) from fixed gradients of the first three outputs (values, opacity, depth).
    """
    from mpkernels.commands import bench as command

    request = command.Request(ops or (), workload, repeats, threads, compile, dtype, device)
    return command.run(request, as_json=json, write=record)


@app.command()
def demo(
    name: Annotated[str | None, typer.Argument(help="An op's name; every demo if none.", show_default=False)] = None,
    output: Output = Path("out/report"),
    steps: Annotated[int | None, typer.Option(help="Steps of fitting.", show_default="the demo's own")] = None,
    planes: Annotated[int | None, typer.Option(help="Planes of the volume.", show_default="the demo's own")] = None,
    device: Device = None,
    backend: Annotated[str | None, typer.Option(help="Of our op; chosen by device if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    json: Json = False,
) -> int:
    """Fit an op's demonstration model to real data, and write its figures and pictures."""
    from mpkernels.commands import demo as command

    settings = {"steps": steps, "planes": planes, "device": device, "backend": backend, "seed": seed}
    return command.run(name, settings, output=output, as_json=json)


@app.command()
def view(
    file: Annotated[Path, typer.Argument(help="Gaussians: a .ply file as viewers of 3DGS read it.")],
    port: Annotated[int, typer.Option(help="Of the page on this machine.")] = 8080,
    device: Device = None,
    backend: Annotated[str | None, typer.Option(help="Of the rasterizer; chosen by device if not given.")] = None,
) -> int:
    """Show Gaussians in the browser, rendered by our own rasterizer (needs viser: pip install viser)."""
    from mpkernels.commands import machine
    from mpkernels.commands import view as command

    if device is not None:
        terminal.choices("--device", [device], machine.devices())
    return command.run(file, port=port, backend=backend, device=device)


@app.command()
def report(
    output: Output = Path("out/report"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Validate and bench again, whatever is recorded.")] = False,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Time ops that have no record here.")] = True,
    json: Json = False,
) -> int:
    """Write one HTML page of what runs here, whether it is right, how fast it is, and the demos' pictures."""
    from mpkernels.commands import report as command

    return command.run(output, fresh=fresh, bench=bench, as_json=json)


def main() -> None:
    """The entry point of ``mpkernels`` and of ``python -m mpkernels``."""
    app(prog_name="mpkernels")
