"""The tables and headlines of bench results, printed or put into the report."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from mpkernels.commands import terminal
from mpkernels.commands.contestants import COMPILED, EAGER

HEADERS = (
    "implementation",
    "pass",
    "time",
    "x eager",
    "x compiled",
    "GB/s",
    "of copy",
    "bound",
    "spread",
)
NUMBERS = ("time", "x eager", "x compiled", "GB/s", "of copy", "spread")


def cells(row: dict) -> list[str]:
    """One row as text, in the order of HEADERS."""
    name = f"{row['implementation']} (default)" if row["default"] else row["implementation"]
    if row["problem"]:
        return [name, row["pass"], "does not run", "-", "-", "-", "-", "-", "-"]
    return [
        name,
        row["pass"],
        terminal.seconds(row["seconds"]),
        times(row["times_faster_than_eager"]),
        times(row["times_faster_than_compiled"]),
        terminal.number(row.get("gb_per_s")),
        percent(row.get("share_of_copy")),
        row.get("bound") or "calls",
        f"± {percent(row['spread'])}",
    ]


def times(x: float | None) -> str:
    """A speed-up: 1 is as fast, 2 takes half the time."""
    return "-" if x is None else f"{x:.2f}x"


def percent(x: float | None) -> str:
    """A share."""
    return "-" if x is None or x != x else f"{100 * x:.0f} %"


def groups(data: dict) -> dict[tuple[str, str], list[dict]]:
    """The rows by op and workload."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in data["rows"]:
        found.setdefault((row["op"], row["workload"]), []).append(row)
    return found


def peers(data: dict) -> str:
    """What we compare with, with versions."""
    return f"{EAGER} and {COMPILED}: torch {data['versions']['torch']}"


def setting(data: dict) -> str:
    """Where and when, in one line."""
    m = data["machine"]
    where = ", ".join(m["gpus"]) if data["device"] == "cuda" else f"{m['processor']}, {m['threads']} threads"
    return f"{where}, {data['dtype']}, {data['date']}"


def ceilings(data: dict) -> str:
    """The measured ceilings in one line."""
    c = data["ceilings"]
    if c is None:
        return "the ceilings of this machine were not measured"
    return (
        f"ceilings measured here: copy {c['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"read {c['read_bytes_per_s'] / 1e9:.1f} GB/s, float32 matrix product {c['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )


def busy(data: dict) -> str | None:
    """A warning where other processes had the machine when the measuring began."""
    load, cores = data["load_before"], data["machine"]["cores"]
    if load is None or not cores or load <= 0.5 * cores:
        return None
    return (
        f"Not to be quoted: the machine was busy when this began (load {load:.1f} on {cores} cores). Functions whose "
        "threads wait for one another, torch.compile's above all, then look many times slower than they are"
    )


def headlines(data: dict) -> list[str]:
    """One sentence a workload and pass, of the default backend; first of all whether the machine was busy."""
    warning = busy(data)
    found = [warning] if warning else []
    for row in data["rows"]:
        if not row["default"]:
            continue
        lead = f"{row['op']}, {row['workload']}, {row['pass']} on {row['implementation']}"
        if row["problem"]:
            found.append(f"{lead}: does not run ({row['problem']})")
            continue
        parts = []
        if row["times_faster_than_eager"] is not None:
            parts.append(compared(row["times_faster_than_eager"], EAGER))
        if row["times_faster_than_compiled"] is not None:
            parts.append(compared(row["times_faster_than_compiled"], COMPILED))
        if row["call_overhead"]:
            parts.insert(0, f"{row['seconds'] * 1e6:.1f} us a call")
        else:
            parts.append(f"{percent(row['share_of_copy'])} of copy bandwidth ({row['bound']}-bound)")
        if row.get("sample_time_by_dense") is not None:
            parts.append(f"a sample takes {row['sample_time_by_dense']:.2f} times as long as a dense one")
        found.append(f"{lead}: {', '.join(parts)}")
    return found


def compared(speed_up: float, peer: str) -> str:
    """A speed-up or a slow-down, in words."""
    if speed_up >= 1:
        return f"{speed_up:.2f} times as fast as {peer}"
    return f"{1 / speed_up:.2f} times slower than {peer}"


def show(data: dict, console: Console) -> None:
    """A table for each workload, then the headlines."""
    console.print(setting(data))
    console.print(f"peers: {peers(data)}")
    console.print(ceilings(data))
    for (op, workload), rows in groups(data).items():
        table = terminal.table(*HEADERS, numbers=NUMBERS, title=f"\n{op}: {escape(workload)}")
        for row in rows:
            table.add_row(*cells(row), style="bold" if row["default"] else None)
        console.print(table)
        for row in rows:
            if row["problem"]:
                console.print(f"  {escape(row['implementation'])}, {row['pass']}: {escape(row['problem'])}")
    console.print()
    for line in headlines(data):
        console.print(f"- {escape(line)}")
    if data["interrupted"]:
        console.print("Interrupted: the rest was not measured.")
