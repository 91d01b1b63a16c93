"""Counts the machine code of a CUDA object file's hot loops: what each warp issues per iteration.

    python tests/sass.py OBJECT [--arch sm_80] [--kernel TEXT]
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

# Clocks of A100: an HMMA m16n8k16 keeps the tensor core of one of four sub-cores busy, an LDSM.x4
# (512 bytes) the shared memory of the whole SM.
HMMA_CLOCKS, SUB_CORES, SHARED_BYTES_PER_CLOCK = 8, 4, 128
TRANSFER = {"LDSM.16.M88.4": 512, "LDSM.16.MT88.4": 512, "LDSM.16.M88.2": 256,
            "LDSM.16.MT88.2": 256, "STS.128": 512, "STS.64": 256, "STS": 128}


def cuobjdump():
    """The tool: that on PATH, else that of the package triton; None without."""
    found = importlib.util.find_spec("triton")
    places = list(found.submodule_search_locations) if found else []
    return shutil.which("cuobjdump") or next(
        (tool for place in places
         if os.access(tool := f"{place}/backends/nvidia/bin/cuobjdump", os.X_OK)), None)


def dump(*arguments):
    """What cuobjdump says."""
    done = subprocess.run([cuobjdump(), *map(str, arguments)], check=True, text=True,
                          capture_output=True)
    return done.stdout + done.stderr


def resources(objects):
    """{kernel: {"registers", "stack", "shared" (static), "local"}}, memory in bytes."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
                       dump("-res-usage", objects))
    return {name: dict(zip(("registers", "stack", "shared", "local"), map(int, numbers)))
            for name, *numbers in found}


def stack_frames(library):
    """[(architecture, kernel)] of the kernels that keep something in local memory."""
    found, arch = [], None
    for line in dump("-res-usage", library).splitlines():
        if header := re.match(r"arch = (\w+)", line):
            arch = header[1]
        elif function := re.search(r"Function (\S+):", line):
            kernel = function[1]
        if re.search(r"STACK:[1-9]|LOCAL:[1-9]", line):
            found.append((arch, kernel))
    return found


def kernels(objects, arch="sm_80"):
    """{kernel: [(address, opcode with suffixes, target of a branch or None)]}"""
    text = dump("-sass", "-arch", arch, objects)
    found = {}
    for part in re.split(r"Function : ", text)[1:]:
        code = []
        for address, guard, opcode, rest in re.findall(
                r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", part):
            opcode = "NOP" if guard.strip() == "@!PT" else opcode
            target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
            code.append((int(address, 16), opcode, target and int(target[1], 16)))
        found[part.split()[0]] = code
    return found


def innermost_loops(code):
    """The instructions of each backward branch that has no other inside."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    spans = [(at[target], i) for i, (address, _, target) in enumerate(code)
             if target is not None and target < address]
    return [span for span in spans
            if not any(other != span and span[0] <= other[0] and other[1] <= span[1]
                       for other in spans)]


def rare(code, begin, end):
    """Indices in [begin, end] that reduce over lanes (SHFL), with as much around them as a forward
    branch jumps over: a tile done again because some row's largest score has grown too much."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    jumps = [range(i + 1, at[target]) for i, (address, _, target) in enumerate(code)
             if begin <= i < end and target is not None and address < target
             and at[target] <= end + 1]
    found = set()
    for i in range(begin, end + 1):
        if code[i][1].startswith("SHFL") and i not in found:
            around = [jump for jump in jumps if i in jump]
            found.update(min(around, key=len, default=()))
    return found


def count(code, begin, end):
    """What one warp issues in an iteration, the rare part apart."""
    skipped = rare(code, begin, end)
    opcodes = [code[i][1] for i in range(begin, end + 1) if i not in skipped]

    def number(*names):
        return sum(opcode.split(".")[0] in names for opcode in opcodes)
    moved = sum(TRANSFER[opcode] for opcode in opcodes
                if opcode.split(".")[0] in ("LDSM", "STS"))
    hmma = sum(opcode.startswith("HMMA.16816") for opcode in opcodes)
    return {"HMMA": hmma, "instructions": len(opcodes), "rare": len(skipped),
            "LDSM": number("LDSM"), "STS": number("STS"), "MUFU": number("MUFU"),
            "local": number("LDL", "STL"),
            "per HMMA": len(opcodes) / max(hmma, 1),
            "shared time": SUB_CORES * moved / SHARED_BYTES_PER_CLOCK / max(hmma * HMMA_CLOCKS, 1),
            "opcodes": {name: opcodes.count(name) for name in sorted(set(opcodes))}}


def arms(code, begin, end):
    """The two sides of a branch in a loop that both come together again, as index ranges: what the
    one and the other warp of a pair does. Two empty ranges where there is no such branch."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    for i in range(begin, end):
        other = at.get(code[i][2], -1)
        if i < other <= end and code[other - 1][1] == "BRA" and at[code[other - 1][2]] > other:
            return range(i + 1, other), range(other, at[code[other - 1][2]])
    return range(0), range(0)


def hot_loop(code):
    """Counts of the innermost loop with the fewest instructions per HMMA, None where none has any;
    of a loop whose warps work in pairs, each on one side of a branch, the mean of both."""
    loops = [span for span in innermost_loops(code) if count(code, *span)["HMMA"]]
    if not loops:
        return None
    begin, end = min(loops, key=lambda span: count(code, *span)["per HMMA"])
    if not any(both := arms(code, begin, end)):
        return count(code, begin, end)
    one, other = ([(*code[i][:2], None) for i in range(begin, end + 1) if i not in arm]
                  for arm in both)
    one, other = count(one, 0, len(one) - 1), count(other, 0, len(other) - 1)
    opcodes = {name: (one["opcodes"].get(name, 0) + other["opcodes"].get(name, 0)) / 2
               for name in sorted(one["opcodes"] | other["opcodes"])}
    return {key: (one[key] + other[key]) / 2 for key in one if key != "opcodes"} | {
        "opcodes": opcodes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("object", type=Path)
    parser.add_argument("--arch", default="sm_80")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this text in it")
    parser.add_argument("--opcodes", action="store_true", help="list the loop's opcodes as well")
    args = parser.parse_args()
    usage = resources(args.object)
    for name, code in kernels(args.object, args.arch).items():
        loop = args.kernel in name and hot_loop(code)
        if not loop:
            continue
        use = usage[name]
        print(f"{name}\n  {use['registers']} registers, {use['stack']} bytes of stack; a turn: "
              + ", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in loop.items() if key != "opcodes"))
        if args.opcodes:
            for opcode, n in loop["opcodes"].items():
                print(f"    {n:5g} {opcode}")


if __name__ == "__main__":
    main()
