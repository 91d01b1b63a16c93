"""python -m vgpu run script.py [args]: a script that uses llama_ext, on the virtual A100."""

import runpy
import sys

from . import library

if len(sys.argv) < 3 or sys.argv[1] != "run":
    sys.exit(__doc__)
sys.argv = sys.argv[2:]
library.activate()
runpy.run_path(sys.argv[0], run_name="__main__")
for launch in library.take_log():
    print(f"vgpu: {launch['kernel']} grid {launch['grid']} block {launch['block']}: "
          f"{launch['warp_instructions']} warp instructions, {launch['seconds']:.2f} s",
          file=sys.stderr)
