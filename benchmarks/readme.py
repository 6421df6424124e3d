"""Writes the tables of README.md and of pages in docs/ from the figures in benchmarks/results.

    python benchmarks/readme.py

On each page of `PAGES`, between `<!-- NAME -->` and `<!-- end -->`, stands what the function of
that name makes of the JSON files that the other scripts here write; `--check` only says whether all
pages are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.netns import LINK_TITLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# of methods as they were without
LEFT = ", keep_rate=False"
ALLGATHER, SPLIT = "topq_allgather", "topq_split"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages' tables from the results.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    options = parser.parse_args()
    for name, tables in PAGES.items():
        page = ROOT / name
        before = page.read_text()
        after = filled(before, tables, name)
        if options.check and before != after:
            sys.exit(f"{name} is out of date: run benchmarks/readme.py")
        if not options.check:
            page.write_text(after)


def filled(text: str, tables: Sequence[Callable[[], str]], page: str) -> str:
    """Return the page's `text` with every one of these tables made anew."""
    for make in tables:
        pattern = rf"(<!-- {make.__name__} -->\n).*?(<!-- end -->)"
        found = re.search(pattern, text, flags=re.DOTALL)
        if found is None:
            sys.exit(f"{page} has no <!-- {make.__name__} --> with an <!-- end --> after it")
        text = text[: found.end(1)] + make() + text[found.start(2) :]
    return text


def accuracy() -> str:
    """Return accuracy, bytes and time, dense beside top-Q."""
    rows = results("accuracy")["rows"]
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        dense, topq = (
            [row for row in rows if row["data"] == data and row["mode"] == mode]
            for mode in ("dense", "topq")
        )
        gaps = [
            100 * (two["test_accuracy"] - one["test_accuracy"])
            for one, two in zip(dense, topq, strict=True)
        ]
        sent, saved = median(dense, "sent_bytes"), median(topq, "sent_bytes")
        lines.append(
            [
                f"{data}, {dense[0]['parameters']:,} parameters",
                f"{100 * median(dense, 'test_accuracy'):.2f} %",
                f"{100 * median(topq, 'test_accuracy'):.2f} %",
                ", ".join(f"{gap:+.2f}" for gap in gaps),
                f"{sent / 1e6:.0f} MB",
                f"{saved / 1e6:.1f} MB",
                f"**{sent / saved:.0f} x**",
            ]
        )
    heads = ["data", "dense", "top-Q", "points, seed by seed", "dense sent", "top-Q sent", "fewer"]
    return markdown(heads, lines)


# what a task trains, and with what
TASK_TITLES = {
    "cifar10-sgd": "CIFAR-10, CNN of 118 k parameters, SGD with momentum",
    "cifar10-adamw": "CIFAR-10, the same CNN, AdamW",
    "gpt-moby": "Moby Dick, GPT of 427 k parameters, AdamW",
    "gpt-shakespeare": "Shakespeare, GPT of 361 k parameters, AdamW",
    "fashion-sgd": "Fashion-MNIST, CNN, SGD with momentum",
    "digits-sgd": "digits, MLP, SGD with momentum",
    "lstm-moby": "Moby Dick, LSTM, AdamW",
    "recommender": "Moby Dick's words, two embeddings, AdamW",
}


CONVERGENCE_HEADS = [
    "accuracy, or loss in nats, on the test part",
    *("ranks, steps", "dense", "defaults", "difference", "fewer bytes", "seeds"),
]


def quality() -> str:
    """Return the rows of `convergence` with the most steps of each task."""
    longest = {row[0]: row for row in convergence_rows()}
    return markdown(CONVERGENCE_HEADS, list(longest.values()))


def convergence() -> str:
    """Return the hook's defaults beside dense, for the tasks where both have been run."""
    return markdown(CONVERGENCE_HEADS, convergence_rows())


def convergence_runs() -> dict[tuple[str, int, int], dict[str, dict[int, dict[str, Any]]]]:
    """Return the runs by task, ranks and steps, then by method and by seed."""
    runs: dict[tuple[str, int, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for line in (RESULTS / "convergence.jsonl").read_text().splitlines():
        run = json.loads(line)
        place = runs.setdefault((run["task"], run["workers"], run["steps"]), {})
        place.setdefault(run["method"], {})[run["seed"]] = run
    return runs


def keep_rate() -> str:
    """Return what the hook loses to dense with keep_rate and without, on the test part."""
    lines = []
    for (task, workers, steps), methods in sorted(convergence_runs().items()):
        for name, without in methods.items():
            kept = {
                seed: run
                for seed, run in methods.get(name.removesuffix(LEFT), {}).items()
                if not run.get("earlier")
            }
            seeds = sorted(kept.keys() & without.keys() & methods.get("dense", {}).keys())
            if not name.endswith(LEFT) or not seeds:
                continue
            dense, before, after = (
                statistics.fmean(of[seed]["test"] for seed in seeds)
                for of in (methods["dense"], without, kept)
            )
            is_loss = task not in ("cifar10-sgd", "cifar10-adamw", "fashion-sgd", "digits-sgd")
            lines.append(
                [
                    f"{task}, {name.removesuffix(LEFT)}",
                    f"{workers}, {steps:,}",
                    f"{statistics.fmean(run['ratio'] for run in kept.values()):.0f} x",
                    *(
                        f"{100 * (one / dense - 1):+.1f} %" if is_loss else f"{one - dense:+.1f}"
                        for one in (before, after)
                    ),
                    str(len(seeds)),
                ]
            )
    heads = ["to dense: points of accuracy, or loss", "ranks, steps", "fewer bytes"]
    return markdown([*heads, "`keep_rate=False`", "the default", "seeds"], lines)


def convergence_rows() -> list[list[str]]:
    """Return a row for each task, number of ranks and of steps, in ascending order of these."""
    runs = convergence_runs()
    lines = []
    for title_of, title in TASK_TITLES.items():
        for (task, workers, steps), methods in sorted(runs.items()):
            dense, ours = methods.get("dense", {}), methods.get("top-Q", {})
            seeds = sorted(dense.keys() & ours.keys())
            if task != title_of or not seeds:
                continue
            one, two = (
                statistics.fmean(of[seed]["test"] for seed in seeds) for of in (dense, ours)
            )
            # runs of the version before, as in docs/convergence.md
            mark = " \u2020" if any(ours[seed].get("earlier") for seed in seeds) else ""
            is_loss = "AdamW" in title and task != "cifar10-adamw"
            lines.append(
                [
                    title,
                    f"{workers}, {steps:,}",
                    f"{one:.3f}" if is_loss else f"{one:.2f} %",
                    (f"{two:.3f}" if is_loss else f"{two:.2f} %") + mark,
                    f"{100 * (two / one - 1):+.1f} %" if is_loss else f"{two - one:+.2f} points",
                    f"**{statistics.fmean(ours[seed]['ratio'] for seed in seeds):.0f} x**",
                    str(len(seeds)),
                ]
            )
    return lines


def ddp_step() -> str:
    """Return what the exchange adds to a step, by hook, link and number of hosts."""
    found = results("ddp_step")
    rows, hooks = found["rows"], found["hooks"]
    places = list(dict.fromkeys((row["link"], row["hosts"]) for row in rows))
    lines = []
    for hook in dict.fromkeys(row["hook"] for row in rows):
        shown = {(row["link"], row["hosts"]): row for row in rows if row["hook"] == hook}
        lines.append([hooks[hook]["title"], *(exchange(shown.get(place)) for place in places)])
    heads = ["ms a step", *(f"{LINK_TITLES[link]}, {hosts} hosts" for link, hosts in places)]
    return markdown(heads, lines)


def exchange(row: dict[str, Any] | None) -> str:
    """Return one hook's exchange on one link."""
    if row is None or row["exchange_ms"] is None:
        return "failed" if row else ""
    return f"{row['exchange_ms']:.0f}"


def optimizer_step() -> str:
    """Return a step of TopQGradientOptimizer beside rai-toolbox's."""
    rows = results("optimizer_step")["rows"]
    return markdown(
        ["param_ndim", "topq_dist", "rai-toolbox", "ratio"],
        [
            [
                str(row["param_ndim"]),
                f"{1e3 * statistics.median(row['ours_s']):.0f} ms",
                f"{1e3 * statistics.median(row['rai_toolbox_s']):.0f} ms",
                f"{row['ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def device() -> str:
    """Return compress() on a GPU beside torch.topk, and what hooks add to a step of a GPT there."""
    lines = []
    found = results("device")
    rows = {(row["method"], row["numel"], row["q"]): row for row in found["rows"]}
    for method, numel, q in rows:
        if method != "compress()":
            continue
        ours, topk = (rows[name, numel, q] for name in (method, "torch.topk"))
        lines.append(
            [
                f"`compress()`, {numel / 1e6:g} M fp32 elements, q = {q:g}",
                (
                    f"{1e3 * statistics.median(ours['times_s']):.2f} ms: {ours['copies']:.0f} "
                    f"copies on the device, `torch.topk` {topk['copies']:.0f}"
                ),
            ]
        )
    steps = results("device_ddp")
    step_ms = {name: 1e3 * statistics.median(row["times_s"]) for name, row in steps["rows"].items()}
    lines += [
        [f"a step of a GPT of 124 M parameters, {name}", f"{taken_ms:.0f} ms{added}"]
        for name, taken_ms in step_ms.items()
        for added in ["" if name == "dense" else f", {taken_ms - step_ms['dense']:+.0f} to dense"]
    ]
    return markdown([f"on one {found['machine']['device']}", "measured"], lines)


def engine() -> str:
    """Return the engine's own figures: speed, size, volume and memory."""
    lines = [*speed().items(), *size().items(), *volume().items(), *beyond_dense().items()]
    return markdown(["the engine", "measured"], lines)


def speed() -> dict[str, str]:
    """Return what compress() takes."""
    return {
        f"`compress()`, 6.55 M fp32 elements, q = {row['q']}, one thread": (
            f"{1e3 * statistics.median(row['times_s']):.1f} ms: {row['memcpys']:.1f} memcpys, "
            f"1/{1 / row['of_topk']:.0f} of `torch.topk`"
        )
        for row in results("selection")["rows"]
        if row["method"] == "compress()" and row["threads"] == 1
    }


def size() -> dict[str, str]:
    """Return how large a frame is, and what entropy-coded values are beside two bits."""
    rows = results("frame_size")["rows"]
    at = {row["value_format"]: row for row in rows if row["density"] == 0.015625}
    coded = {
        f"frame of 1.5625 % of 25.56 M elements, {name}": (
            f"{row['frame_bytes'] / 1e6:.3f} MB, {row['times_smaller_than_fp32']:.0f} x smaller; "
            f"{row['value_bits']:.2f} bits a value, {100 * row['error']:.2f} % rounding error"
        )
        for name, row in at.items()
        if name in ("int2", "ec2", "ec1")
    }
    return coded | {
        f"frame of {100 * row['density']:g} % of 25.56 M elements, fp16": (
            f"{row['frame_bytes'] / 1e6:.3f} MB, {row['times_smaller_than_fp32']:.0f} x smaller; "
            f"{100 * row['over']:.2f} % over the entropy bound"
        )
        for row in rows
        if row["value_format"] == "fp16" and row["density"] in (0.01, 0.001)
    }


def volume() -> dict[str, str]:
    """Return what leaves a rank, by the number of ranks."""
    sent = {(row["hook"], row["world_size"]): row for row in results("bytes_vs_world")["rows"]}
    sizes = sorted({size for _, size in sent})
    frame_bytes = sent[ALLGATHER, 2]["tcp_bytes"]
    return {
        f"frames that leave a rank, {title}, W = {', '.join(map(str, sizes))}": ", ".join(
            f"{sent[hook, size]['tcp_bytes'] / frame_bytes:.2f}" for size in sizes
        )
        for hook, title in ((ALLGATHER, "all-gather"), (SPLIT, "split-reduce"))
    }


def beyond_dense() -> dict[str, str]:
    """Return what memory the hook takes."""
    found = results("memory")
    gradient_mb = found["gradient_bytes"] / 1e6
    rows = {row["mode"]: row for row in found["rows"]}
    code_mb = rows["loaded"]["beyond_dense_bytes"] / 1e6
    return {
        f"memory beyond a dense step, {row['mode']}": (
            f"{row['beyond_dense_bytes'] / 1e6:.0f} MB: {gradient_mb:.0f} the residual, "
            f"{code_mb:.0f} code, the rest scratch"
        )
        for row in found["rows"]
        if row["mode"] not in ("dense", "loaded")
    }


def accuracy_ps() -> str:
    """Return accuracy and bytes both ways, dense DDP beside the parameter server."""
    rows = results("accuracy_ps")["rows"]
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        dense, topq = (
            [row for row in rows if row["data"] == data and (row["mode"] == "dense") == is_dense]
            for is_dense in (True, False)
        )
        gaps = [
            100 * (two["test_accuracy"] - one["test_accuracy"])
            for one, two in zip(dense, topq, strict=True)
        ]
        lines.append(
            [
                data,
                f"{100 * median(dense, 'test_accuracy'):.2f} %",
                f"{100 * median(topq, 'test_accuracy'):.2f} %",
                ", ".join(f"{gap:+.2f}" for gap in gaps),
                *(
                    f"**{median(dense, way) / median(topq, way):.0f} x**"
                    for way in ("sent_bytes", "received_bytes")
                ),
            ]
        )
    heads = ["data", "dense DDP", "server", "points, seed by seed", "fewer bytes up", "down"]
    return markdown(heads, lines)


def ps_step() -> str:
    """Return what the exchange through a server adds to a step, by link."""
    found = results("ps_step")
    rows, ways = found["rows"], found["ways"]
    links = list(dict.fromkeys(row["link"] for row in rows))
    lines = []
    for way, title in ways.items():
        shown = {row["link"]: row for row in rows if row["hook"] == way}
        lines.append([title, *(exchange(shown.get(link)) for link in links)])
    return markdown(["ms a step, 2 workers", *(LINK_TITLES[link] for link in links)], lines)


def ps_load() -> str:
    """Return what a server carries: speed beside gRPC and sockets, CPU and memory."""
    lines = [
        [
            f"{frame_text(row['up_bytes'])} up, {frame_text(row['down_bytes'])} down",
            f"{1 / row['round_s']:.{0 if row['round_s'] < 0.1 else 1}f}",
            f"{row['gb_per_s']:.{2 if row['gb_per_s'] > 0.1 else 3}f}",
            f"{row['gb_per_s'] / row['bare_grpc_gb_per_s']:.0%}",
            f"{row['gb_per_s'] / row['raw_tcp_gb_per_s']:.0%}",
            f"{1e3 * row['server_cpu_s']:.0f} + {1e3 * row['workers_cpu_s']:.0f} ms",
            f"{row['rss_bytes'][0] / 1e6:.0f}, {row['rss_bytes'][-1] / 1e6:.0f} MB",
        ]
        for row in results("ps_load")["rows"]
    ]
    heads = ["a worker's frame", "rounds a second", "GB/s", "of bare gRPC", "of raw TCP"]
    heads += ["CPU a round, server + workers", "server's memory, after a tenth and at the end"]
    return markdown(heads, lines)


def local_steps() -> str:
    """Return what rounds add to an inner step, by method and link."""
    rows = results("local_steps")["rows"]
    links = list(dict.fromkeys(row["link"] for row in rows))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        here = {row["link"]: row for row in rows if row["method"] == method}
        lines.append(
            [
                method,
                frame_text(here[links[0]]["sent_bytes"]),
                *(
                    f"{here[link]['step_ms']:.0f}, {100 * here[link]['ratio'] - 100:+.1f} % "
                    f"({100 * here[link]['lowest_ratio'] - 100:+.0f} to "
                    f"{100 * here[link]['highest_ratio'] - 100:+.0f})"
                    for link in links
                ),
            ]
        )
    heads = ["ms an inner step, to steps without rounds", "sent a step"]
    return markdown(heads + [LINK_TITLES[link] for link in links], lines)


def advise() -> str:
    """Return predicted and measured steps, by method and link."""
    rows = results("advise")["rows"]
    links = list(dict.fromkeys(row["link"] for row in rows))
    lines = []
    for method in sorted({row["method"] for row in rows}):
        here = {row["link"]: row for row in rows if row["method"] == method}
        cells = (
            f"{row['predicted_ms']:.0f} / {row['measured_ms']:.0f}, {100 * row['error']:+.0f} %"
            for row in map(here.__getitem__, links)
        )
        lines.append([method, *cells])
    heads = ["ms a step, predicted / measured", *(LINK_TITLES[link] for link in links)]
    return markdown(heads, lines)


def frame_text(count_bytes: int) -> str:
    """Return so many bytes as text."""
    return f"{count_bytes / 1e6:.0f} MB" if count_bytes >= 1e6 else f"{count_bytes / 1e3:.1f} kB"


def results(name: str) -> Any:
    """Return what the script of this name has written."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def median(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of one figure."""
    return float(statistics.median(row[key] for row in rows))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *lines))


PAGES: dict[str, Sequence[Callable[[], str]]] = {
    "README.md": [quality],
    "docs/benchmarks.md": [
        convergence,
        accuracy,
        accuracy_ps,
        ddp_step,
        ps_step,
        ps_load,
        engine,
        optimizer_step,
    ],
    "docs/accuracy.md": [keep_rate],
    "docs/advise.md": [advise],
    "docs/gpu.md": [device],
    "docs/local_steps.md": [local_steps],
}


if __name__ == "__main__":
    main()
