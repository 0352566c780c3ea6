"""Tables of single kernels and of packed rows, each from the JSON of its benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.section import About, Results, section

CASES = {
    "frozen": "Frozen head, forward and backward (log-probs with gradient, entropies without)",
    "no_grad": "No gradient (log-probs and entropies)",
    "trained": "Trained head, forward and backward",
}

# Peers that give what a trainer needs, a gradient for each token; the bars are against these
JUDGED = ("trl", "liger_none", "liger_grpo")


@section
def linear_logprob(about: About, results: Results) -> str:
    """The section's tables, in Markdown."""
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, TRL {about['trl']}, Liger {about['liger-kernel']}."
    ]
    for case, title in CASES.items():
        rows = [row for row in results if row["case"] == case]
        names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
        lines += ["", f"{title}; the bar is {rows[0]['bar']}x:", ""]
        lines.append(f"| N | H | {' | '.join(names)} | fastest peer / ours |")
        lines.append("|---" * (len(names) + 3) + "|")
        lines += [_row(row, names) for row in rows]
    return "\n".join(lines)


def _row(row: dict[str, Any], names: list[str]) -> str:
    timings = row["timings"]
    cells = [f"{row['n']:,}", f"{row['h']:,}"]
    for name in names:
        timing = timings.get(name)
        extra = "" if name == "products" or timing is None else f" ({timing['extra_mib']:.0f})"
        cells.append("-" if timing is None else f"{timing['median_ms']:.1f}{extra}")
    fastest = min(timings[name]["median_ms"] for name in JUDGED if name in timings)
    cells.append(f"{fastest / timings['trl_turbo']['median_ms']:.2f}x")
    return f"| {' | '.join(cells)} |"


@section
def lora_fold(about: About, results: Results) -> str:
    """The section's table, in Markdown."""
    names = list(results[0]["timings"])
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, PEFT {about['peft']}.",
        "",
        "![lora_fold](../benchmarks/results/lora_fold.png)",
        "",
        f"| model | layers | adapter adds | log | fold | restore | {' | '.join(names)} | GB/s (copy) | drift of peft |",
        "|---" * (len(names) + 8) + "|",
    ]
    for row in results:
        cells = [row["model"], str(row["layers"]), f"{row['adapter_share']:.1%}"]
        cells += [f"{row['log_bytes'] / row['weight_bytes']:.2%}", f"{row['fold_ms']:.1f}", f"{row['restore_ms']:.1f}"]
        timings = (row["timings"][name] for name in names)
        cells += [f"{timing['median_ms']:.1f} ({timing['extra_mib']:.0f})" for timing in timings]
        cells += [f"{row['gbps']:,.0f} ({row['copy_gbps']:,.0f})", f"{row['peft_changed'] / row['weights']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@section
def lora(about: About, results: Results) -> str:
    """The section's table, in Markdown."""
    phases = ("forward", "backward", "both")
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, PEFT "
        f"{about['peft']}, transformers {about['transformers']}, bitsandbytes {about['bitsandbytes']}.",
        "",
        "![lora](../benchmarks/results/lora.png)",
        "",
        f"| block | H | N | rank | base | {' | '.join(f'{phase}, ms' for phase in phases)} | kept, MiB |",
        "|---" * 9 + "|",
    ]
    for row in results:
        cells = [row["block"], f"{row['h']:,}", f"{row['n']:,}", str(row["rank"]), row["base"]]
        for phase in phases:
            ours, peft = (row[phase][name]["median_ms"] for name in ("trl_turbo", "peft"))
            cells.append(f"{ours:.2f} ({peft / ours:.2f}x)")
        kept = row["kept_mib"]
        cells.append(f"{kept['trl_turbo']:,.0f} ({kept['peft']:,.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@section
def dequantise(about: About, results: Results) -> str:
    """The section's table, in Markdown."""
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, bitsandbytes {about['bitsandbytes']}.",
        "",
        "![dequantise](../benchmarks/results/dequantise.png)",
        "",
        "| weight | trl_turbo, us | bitsandbytes, us | GB/s | of a copy | host, us | bitsandbytes' host, us |",
        "|---" * 7 + "|",
    ]
    for row in results:
        mine, other = (row["timings"][name] for name in ("trl_turbo", "bitsandbytes"))
        ratio = other["median_ms"] / mine["median_ms"]
        cells = ["{:,} x {:,}".format(*row["shape"]), f"{mine['median_ms'] * 1e3:,.1f}"]
        cells += [f"{other['median_ms'] * 1e3:,.1f} ({ratio:.2f}x)", f"{row['gbps']:,.0f}"]
        cells += [f"{row['gbps'] / row['copy_gbps']:.0%}", f"{mine['host_us']:.1f}", f"{other['host_us']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@section
def paged_attention(about: About, results: Results) -> str:
    """The section's table, in Markdown."""
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, vLLM {about['vllm']}.",
        "",
        "![paged_attention](../benchmarks/results/paged_attention.png)",
        "",
        "| model | sequences | trl_turbo, us a layer | vLLM, us a layer |",
        "|---" * 4 + "|",
    ]
    for row in results:
        mine, other = (row["timings"].get(name, {}).get("median_us") for name in ("trl_turbo", "vllm"))
        cells = [row["model"], f"{row['rows']} x {row['length']:,}", f"{mine:,.1f}"]
        cells.append(f"{other:,.1f} ({other / mine:.2f}x)" if other else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@section
def skinny(about: About, results: Results) -> str:
    """The section's table, in Markdown."""
    peers = list(dict.fromkeys(name for row in results for name in row["timings"] if name != "trl_turbo"))
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, vLLM {about['vllm']}.",
        "",
        "![skinny](../benchmarks/results/skinny.png)",
        "",
        f"| model | layer | rows | weight | trl_turbo, us | {' | '.join(f'{name}, us' for name in peers)} | GB/s |",
        "|---" * (len(peers) + 6) + "|",
    ]
    for row in results:
        times = {name: timing["median_ms"] * 1e3 for name, timing in row["timings"].items()}
        cells = [row["model"], row["op"], str(row["m"]), "{:,} x {:,}".format(*row["shape"])]
        cells.append(f"{times['trl_turbo']:.1f}")
        for name in peers:
            ratio = f"{times[name]:.1f} ({times[name] / times['trl_turbo']:.2f}x)" if name in times else "-"
            cells.append(ratio)
        lines.append(f"| {' | '.join([*cells, format(row['gbps'], ',.0f')])} |")
    return "\n".join(lines)


@section
def blocks(about: About, results: Results) -> str:
    """The section's tables, in Markdown."""
    names = list(dict.fromkeys(name for row in results for name in row["forward"]["timings"]))
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, transformers {about['transformers']}, Liger {about['liger-kernel']}.",
        "",
        "![blocks](../benchmarks/results/blocks.png)",
    ]
    for phase in ("forward", "backward", "both"):
        lines += ["", f"{phase.capitalize()}:", ""]
        lines.append(f"| operation | tokens | hidden | {' | '.join(names)} | fastest peer / ours | GB/s | of a copy |")
        lines.append("|---" * (len(names) + 6) + "|")
        for row in results:
            part = row[phase]
            times = {name: timing["median_ms"] * 1e3 for name, timing in part["timings"].items()}
            peers = [time for name, time in times.items() if name != "trl_turbo"]
            cells = [row["op"], f"{row['n']:,}", f"{row['hidden']:,}"]
            cells += [f"{times[name]:,.1f}" if name in times else "-" for name in names]
            cells.append(f"{min(peers) / times['trl_turbo']:.2f}x")
            cells += [f"{part['gbps']:,.0f}", f"{part['gbps'] / part['copy_gbps']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@section
def attention(about: About, results: Results) -> str:
    """The section's tables, in Markdown."""
    peers = [name for row in results for name in row["both"]["timings"] if name != "trl_turbo"]
    peers = list(dict.fromkeys(peers))
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}.",
        "",
        "![attention](../benchmarks/results/attention.png)",
    ]
    for phase in ("forward", "backward", "both"):
        lines += ["", f"{phase.capitalize()}:", ""]
        lines.append(f"| batch | tokens | heads | trl_turbo | TFLOP/s | {' | '.join(peers)} |")
        lines.append("|---" * (len(peers) + 5) + "|")
        for row in results:
            times = {name: timing["median_ms"] for name, timing in row[phase]["timings"].items()}
            cells = [row["case"], f"{row['tokens']:,}", f"{row['heads']}/{row['key_heads']}"]
            cells += [f"{times['trl_turbo']:.2f}", f"{row[phase]['tflops']:.0f}"]
            for name in peers:
                ratio = f"{times[name]:.2f} ({times[name] / times['trl_turbo']:.2f}x)" if name in times else "-"
                cells.append(ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@section
def packing(about: About, results: Results) -> str:
    """The section's table, in Markdown."""
    names = list(dict.fromkeys(name for row in results for name in row["timings"]))
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, TRL {about['trl']}, transformers {about['transformers']}. Medians in ms, in brackets MiB.",
        "",
        "![packing](../benchmarks/results/packing.png)",
        "",
        f"| batch | {' | '.join(names)} | as fast as stock | of its memory |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in results:
        timings = row["timings"]
        cells = [row["setting"]]
        for name in names:
            timing = timings.get(name)
            out = "out of memory"
            cells.append(out if timing is None else f"{timing['median_ms']:,.0f} ({timing['extra_mib']:,.0f})")
        stock, ours = timings.get("trl"), timings.get("trl_turbo")
        known = stock is not None and ours is not None
        cells.append(f"{stock['median_ms'] / ours['median_ms']:.2f}x" if known else "-")
        cells.append(f"{ours['extra_mib'] / stock['extra_mib']:.0%}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
