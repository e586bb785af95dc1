"""The tables of docs/results/scaling.md: `trainer/planning/scaling.py` and `benchmarks.network_scaling`.

python -m benchmarks.scaling                                   writes the page's tables anew
python -m benchmarks.scaling --users 100000000 --batch 2048    prints them for something else
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path

from benchmarks.network_scaling import format_result
from embeddings.planning.memory import limits
from embeddings.planning.traffic import by_link
from trainer.planning.scaling import (
    Decoder,
    Description,
    Layout,
    checkpoint_seconds,
    dense_parameters,
    extraction_flops,
    extraction_hours,
    flops_per_sample,
    lay_out,
)

PAGE = Path(__file__).parent.parent / "docs/results/scaling.md"
NETWORK = Path(__file__).parent / "results/network_scaling.json"
GPUS = (64, 512)
POOLED = ("row_wise", "table_row_wise", "grid_shard")  # of tables that give one vector per sample
WIDTHS = (32, 128, 1024, 4096)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _fits(needed: float, room: float) -> str:
    return "yes" if needed <= room else f"no: {_gb(needed - room)} short"


def assumptions_table(description: Description) -> str:
    """Every number that goes in."""
    meanings = dict(re.findall(r"^ {8}(\w+): (.*)$", Description.__doc__ or "", re.MULTILINE))
    rows = [
        [f"`{one.name}`", _value(getattr(description, one.name)), meanings[one.name]]
        for one in fields(description)
    ]
    hardware = description.hardware(GPUS[0])
    rates = {
        "device_memory": "Bytes of a GPU's memory.",
        "reserved": "Share of it that tables leave free.",
        "device_bandwidth": "Bytes per second of a GPU's memory, data sheet.",
        "intra_host": "Bytes per second and GPU within a host, each way, data sheet.",
        "inter_host": "Bytes per second and GPU between hosts, each way, data sheet.",
    }
    rows += [
        [f"`{name}`", f"{getattr(hardware, name):.4g}", words] for name, words in rates.items()
    ]
    return _table(["name", "value", "meaning"], rows)


def _value(value: int | float | str) -> str:
    if isinstance(value, str):
        return f"`{value}`"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _names(layout: Layout) -> list[str]:
    return [str(layout.gpus), f"`{layout.pooled}`"]


def memory_table(layouts: list[Layout], description: Description) -> str:
    """Memory of the fullest GPU, by part."""
    head = [
        "GPUs",
        "pooled tables",
        "id rows",
        "optimizer state",
        "knowledge",
        "activations of tables",
    ]
    rows = []
    for one in layouts:
        room = limits(description.hardware(one.gpus))[0]
        memory = one.memory
        total = float(memory.device.max()) + one.dense_memory
        parts = [memory.tables, memory.optimizer, memory.frozen, memory.activations]
        rows.append(
            [
                *_names(one),
                *(_gb(part.max()) for part in parts),
                _gb(one.dense_memory),
                _gb(total),
                _fits(total, room),
            ]
        )
    return _table([*head, "dense part", "fullest GPU", "fits"], rows)


def link_table(layouts: list[Layout], description: Description) -> str:
    """Bytes per sample over each link, by stage."""
    stages = {"input": "ids", "output": "vectors", "backward": "their gradients"}
    head = ["GPUs", "pooled tables"]
    head += [f"{words}: in host, between" for words in (*stages.values(), "dense gradients")]
    rows = []
    for one in layouts:
        hosts, samples = one.gpus // description.gpus_per_host, one.gpus * description.batch
        links = [by_link(getattr(one.traffic, stage), hosts) for stage in stages]
        links.append(by_link(one.dense_traffic, hosts))
        cells = [f"{inside / samples:,.0f}, {between / samples:,.0f}" for inside, between in links]
        rows.append(
            [*_names(one), *cells, f"{one.per_sample[0]:,.0f}", f"{one.per_sample[1]:,.0f}"]
        )
    return _table([*head, "all, in host", "all, between hosts"], rows)


def bound_table(layouts: list[Layout], description: Description) -> str:
    """Least milliseconds per step of each resource, the one that binds, and samples per second."""
    head = ["GPUs", "pooled tables", *(f"{name}, ms" for name in layouts[0].seconds)]
    rows = []
    for one in layouts:
        samples = one.gpus * description.batch
        times = one.seconds.values()
        rows.append(
            [
                *_names(one),
                *(f"{1e3 * time:.2f}" for time in times),
                one.bound,
                f"{samples / max(times) / 1e6:,.0f}",
                f"{samples / sum(times) / 1e6:,.0f}",
            ]
        )
    tail = ["binds", "M samples/s, all overlaps", "M samples/s, nothing overlaps"]
    return _table([*head, *tail], rows)


def checkpoint_table(layouts: list[Layout], description: Description) -> str:
    """Bytes of a checkpoint and seconds to write it."""
    rows = [
        [
            *_names(one),
            _gb(one.saved.sum() + one.saved_dense),
            _gb(one.saved.max()),
            f"{checkpoint_seconds(one, description):,.1f}",
        ]
        for one in layouts
    ]
    return _table(["GPUs", "pooled tables", "GB, all", "GB, fullest GPU", "seconds"], rows)


def extraction_table(description: Description) -> str:
    """Work and hours of the language model."""
    rows = []
    for name, count, tokens in (
        ("users", description.users, description.user_tokens),
        ("items", description.items, description.item_tokens),
        ("1 % of the users anew", description.users // 100, description.user_tokens),
    ):
        work = extraction_flops(Decoder(), tokens, description.shared_tokens)
        hours = [f"{extraction_hours(description, count, tokens, gpus):,.2f}" for gpus in GPUS]
        size = count * Decoder().hidden * 2
        new = count * (tokens - description.shared_tokens)
        rows.append([name, f"{count:,}", f"{new:.3g}", f"{work:.3g}", *hours, _gb(size)])
    hours = [f"hours on {gpus} GPUs" for gpus in GPUS]
    head = ["what", "prompts", "tokens computed", "FLOPs per prompt", *hours]
    return _table([*head, f"GB of vectors ({Decoder().hidden} x float16)"], rows)


def width_table(description: Description) -> str:
    """What wider knowledge vectors cost, pooled tables cut by columns and rows (grid_shard)."""
    rows = []
    for width in WIDTHS:
        model = replace(description, knowledge_dim=width).model()
        for gpus in GPUS:
            one = lay_out(replace(description, knowledge_dim=width), model, gpus, "grid_shard")
            total, room = float(one.memory.device.max()), limits(description.hardware(gpus))[0]
            rows.append(
                [
                    str(width),
                    str(gpus),
                    _gb(one.memory.frozen.max()),
                    _gb(total),
                    _fits(total, room),
                    f"{one.per_sample[1]:,.0f}",
                    f"{1e3 * one.seconds['link between hosts']:.2f}",
                ]
            )
    head = ["width", "GPUs", "knowledge, GB per GPU", "all of the tables, GB", "fits"]
    return _table([*head, "bytes per sample between hosts", "ms per step between hosts"], rows)


def make_tables(description: Description) -> dict[str, str]:
    """The page's tables by name."""
    model = description.model()
    flops = flops_per_sample(model, description)
    rate = description.training_flops * description.training_utilisation
    layouts = []
    for gpus in GPUS:
        for pooled in POOLED:
            one = lay_out(description, model, gpus, pooled)
            layouts.append(
                replace(one, seconds=one.seconds | {"compute": flops * description.batch / rate})
            )
    makers: dict[str, Callable[[list[Layout], Description], str]] = {
        "memory": memory_table,
        "links": link_table,
        "bound": bound_table,
        "checkpoint": checkpoint_table,
    }
    size = [[f"{dense_parameters(model):,}", f"{flops / 1e6:,.1f}"]]
    return {
        "assumptions": assumptions_table(description),
        "dense": _table(["dense parameters", "MFLOPs per sample, counted"], size),
        **{name: make(layouts, description) for name, make in makers.items()},
        "width": width_table(description),
        "extraction": extraction_table(description),
    }


def page_tables() -> dict[str, str]:
    """All tables of the page, the measured one as it was measured."""
    measured = json.loads(NETWORK.read_text(encoding="utf-8"))
    return make_tables(Description()) | {"network": format_result(measured)}


def filled(text: str, made: dict[str, str]) -> str:
    """The page with these tables between their markers."""
    for name, table in made.items():
        pattern = re.compile(f"(<!-- scaling {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no place for the table {name}")
        text = pattern.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


def main() -> None:
    """Writes the page's tables, or prints those of another description."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for one in fields(Description):
        assert one.default is not MISSING
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    if given:
        made = make_tables(Description(**given))
        print("\n".join(f"{name}\n\n{table}" for name, table in made.items()))
        return
    PAGE.write_text(filled(PAGE.read_text(), page_tables()))


if __name__ == "__main__":
    main()
