"""Two results of `run` or `models`, old and new: what became faster or slower.

For each row that both have: our time, old over new (above 1, it became faster), and how our share
of the limit changed, which says more where the two machines differ or were not equally busy. A row
is worse where its share fell by more than the threshold; where the time alone grew by so much, the
limit fell too, and the machine is the likelier cause.
"""

from llama_ext.errors import LlamaExtError

from . import result


def compared(old, new, threshold):
    """[{"key", "speed" (old time over new), "share" (new share over old), "verdict"}] of the rows
    that both results have; verdict: "worse", "better", "slower machine" or ""."""
    before = {result.key(row): row["providers"].get(result.OURS) for row in old["rows"]}
    rows = []
    for row in new["rows"]:
        a, b = before.get(result.key(row)), row["providers"].get(result.OURS)
        if a is None or b is None:
            continue
        speed, share = a["seconds"] / b["seconds"], b["share"] / a["share"]
        verdict = ("worse" if share < 1 - threshold else "better" if share > 1 + threshold
                   else "slower machine" if speed < 1 - threshold else "")
        rows.append({"key": result.key(row), "speed": speed, "share": share, "verdict": verdict})
    return rows


def only_in_one(old, new):
    """Keys of rows in which only one of both results has our time."""
    keys = [{result.key(row) for row in found["rows"] if result.OURS in row["providers"]}
            for found in (old, new)]
    return sorted(keys[0] ^ keys[1])


def differences(old, new):
    """A sentence for each thing about the machines that is not the same."""
    return [f"{name} differs: {old.get(name)} before, {new.get(name)} now; shares of the limit can "
            "be compared, times cannot"
            for name in ("device", "threads", "isa", "torch") if old.get(name) != new.get(name)]


def run(args):
    if not 0 <= args.threshold < 100:
        raise LlamaExtError(f"--threshold: expected 0 to 100 per cent, got {args.threshold}")
    old, new = result.load(args.old), result.load(args.new)
    for sentence in differences(old, new):
        print(sentence)
    rows = compared(old, new, args.threshold / 100)
    if not rows:
        raise LlamaExtError(f"{args.new}: expected rows that {args.old} has too, got none")
    print(f"{'op':20} {'shape':30} {'dtype':5} {'direction':16} {'speed':>6} {'share':>6}")
    for row in rows:
        op, shape, dtype, direction = row["key"]
        print(f"{op:20} {shape:30} {dtype:5} {direction:16} {row['speed']:6.2f} "
              f"{row['share']:6.2f} {row['verdict']}".rstrip())
    for row in only_in_one(old, new):
        print(f"in one of the files only: {' '.join(row)}")
    worse = sum(row["verdict"] == "worse" for row in rows)
    print(f"{worse} of {len(rows)} rows worse by more than {args.threshold:g} %")
    return int(args.fail_worse and worse > 0)
