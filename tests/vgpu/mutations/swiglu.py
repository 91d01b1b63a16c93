"""Faults of swiglu.cu: (name, file, text that occurs once, what replaces it)."""

TESTS = ["tests/test_swiglu.py", "tests/test_cuda_swiglu.py", "tests/test_cuda_counts.py", "-k",
         "not machine_code and not in_flight and (swiglu or not counts)"]

CU = "swiglu.cu"

FAULTS = [
    ("sigmoid of gate, not of its negative", CU, "__fdividef(1, 1 + expf(-g))",
     "__fdividef(1, 1 + expf(g))"),
    ("sigmoid in fp64 of the wrong sign", CU, "1 / (1 + exp(-g))", "1 / (1 + exp(g))"),
    ("sigmoid off by 0.5 %", CU, "__fdividef(1, 1 +", "__fdividef(A(1.005), 1 +"),
    ("sigmoid for silu", CU, "silu() const { return gate * s; }", "silu() const { return s; }"),
    ("gelu's derivative, nearly", CU,
     "return s * (1 + gate * (1 - s))", "return s * (1 + gate * s)"),
    ("derivative without its second term", CU, "return s * (1 + gate * (1 - s))", "return s"),
    ("derivative's second term off by 1 %", CU, "return s * (1 + gate * (1 - s))",
     "return s * (1 + A(1.01) * gate * (1 - s))"),
    ("forward without up", CU, ".silu() * to_acc(r_up[k].at[e]))", ".silu())"),
    ("product rounded twice", CU, "round_to<T>(Sigmoid(to_acc(r_gate[k].at[e])).silu() *",
     "round_to<T>(to_acc(round_to<T>(Sigmoid(to_acc(r_gate[k].at[e])).silu())) *"),
    ("dgate without up", CU, "(d * to_acc(r_up[k].at[e]) * s.dsilu())", "(d * s.dsilu())"),
    ("dup from up", CU,
     "round_to<T>(d * s.silu())", "round_to<T>(to_acc(r_up[k].at[e]) * s.silu())"),
    ("dgate and dup exchanged", CU,
     "    store(dgate + v * kN, r_dgate);\n    store(dup + v * kN, r_dup)",
     "    store(dgate + v * kN, r_dup);\n    store(dup + v * kN, r_dgate)"),
    ("no bound on rows in the backward", CU,
     "  if (at.row >= rows) return;\n  dout = row", "  dout = row"),
    ("no bound on rows in the forward", CU,
     "  if (at.row >= rows) return;\n  gate = row", "  gate = row"),
    ("one vector beyond the row", CU,
     "    if (v * kN >= F) break;\n    r_gate[k] = load_once<kN>(gate + v * kN);\n    r_up",
     "    if (v * kN > F) break;\n    r_gate[k] = load_once<kN>(gate + v * kN);\n    r_up"),
    ("last vector not written", CU, "    if (v * kN >= F) break;\n    Vec<T, kN> r_dgate, r_dup;",
     "    if (v * kN + kN >= F) break;\n    Vec<T, kN> r_dgate, r_dup;"),
    ("chunks overlap", CU, "blockIdx.x % chunks * blockDim.x * kKeep + threadIdx.x",
     "blockIdx.x % chunks * blockDim.x + threadIdx.x"),
    ("rows of a block overlap", CU, "blockIdx.x / chunks * blockDim.y + threadIdx.y",
     "blockIdx.x / chunks + threadIdx.y"),
    ("grid without the last chunk", CU, "chunks = ceil_div(vecs, threads * keep)",
     "chunks = std::max<int64_t>(vecs / (threads * keep), 1)"),
    ("grid without the last rows", CU, "ceil_div(rows, block.y) * chunks",
     "std::max<int64_t>(rows / block.y, 1) * chunks"),
    ("up read at the rows of gate", CU, "up = row(up, up_rows, at.row);\n  out +=",
     "up = row(up, gate_rows, at.row);\n  out +="),
    ("gradients packed where they are halves", CU, "dup += at.row * grad_stride",
     "dup += int64_t(at.row) * F"),
    ("32-bit offset of a gradient row", CU, "  const Place at = Place::here<kKeep>(chunks);\n"
     "  if (at.row >= rows) return;\n  dout = row(dout, dout_rows, at.row)",
     "  const Place at = Place::here<kKeep>(chunks);\n"
     "  if (at.row >= rows) return;\n  dout += int(at.row * dout_rows.stride[2])"),
    ("gaps between rows taken for none", CU, "(r.size[2] == 1 || r.stride[2] == F)", "true"),
    ("dout's gaps not looked at", CU, "if (gapless(dout_rows, F) && gapless(gate_rows, F)",
     "if (gapless(gate_rows, F)"),
    ("halves taken for one long row", CU, " && grad_stride == F &&\n", " &&\n"),
    ("misaligned up taken for aligned", CU,
     "!aligned<T>(gate, gate_rows) || !aligned<T>(up, up_rows))\n"
     "      return launch(swiglu_fwd",
     "!aligned<T>(gate, gate_rows))\n      return launch(swiglu_fwd"),
    ("neighbouring vectors to one thread", CU,
     "    const int v = at.first + k * blockDim.x;\n    if (v * kN >= F) break;\n"
     "    r_dout[k]", "    const int v = at.first * kKeep + k;\n    if (v * kN >= F) break;\n"
     "    r_dout[k]"),
]
