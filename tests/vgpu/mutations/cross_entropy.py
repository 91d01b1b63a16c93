"""Faults of cross_entropy.cu: (name, file, text that occurs once, what replaces it)."""

TESTS = ["tests/test_cross_entropy.py", "tests/test_cuda_cross_entropy.py",
         "tests/test_cuda_counts.py", "-k",
         "not machine_code and not in_flight and (cross_entropy or not counts)"]

CU = "cross_entropy.cu"

FAULTS = [
    # log-sum-exp
    ("exp of base 2", CU, "ptx::ex2(x * 1.44269504f)", "ptx::ex2(x)"),
    ("exp off by 0.5 %", CU, "ptx::ex2(x * 1.44269504f)", "1.005f * ptx::ex2(x * 1.44269504f)"),
    ("sum not scaled to a new maximum", CU,
     "    if (before > -kInf<A>) sum *= exp_quick(shift_before - shift());  // else 0, or NaN if one "
     "came\n", ""),
    ("sum scaled the other way", CU, "exp_quick(shift_before - shift());", "exp_quick(shift() - "
     "shift_before);"),
    ("inf - inf where a row is infinite", CU, "return max > -kInf<A> && max < kInf<A> ? max : A(0);",
     "return max;"),
    ("sums joined without scaling", CU, "    o.raise_max(max);\n", ""),
    ("one operand of a join left as it was", CU, "    raise_max(o.max);\n", ""),
    ("lse without the maximum", CU, "return shift() + ::log(sum);", "return ::log(sum);"),
    ("half a warp joined", CU, "int other = 16; other > 0", "int other = 8; other > 0"),
    ("last warp's pair missing", CU, "w < warps; w++", "w < warps - 1; w++"),
    ("no barrier before the warps' pairs are read", CU,
     "    __syncthreads();  // the first thread reads every warp's\n", ""),
    ("maximum of the last vector only", CU, "top = largest(top, to_acc(r_z[k].at[e]))",
     "top = to_acc(r_z[k].at[e])"),
    ("largest value, not the largest so far", CU, "    max = largest(max, value);\n",
     "    max = value;\n"),
    # the row's parts
    ("vectors of one batch only", CU, "first < split.vecs; first += kBatch * blockDim.x",
     "first < min(split.vecs, 1); first += kBatch * blockDim.x"),
    ("batches overlap", CU, "first += kBatch * blockDim.x", "first += (kBatch - 1) * blockDim.x"),
    ("vectors beyond the row", CU, "if (v < split.vecs) r_z[k] = load_once", "if (v <= split.vecs) "
     "r_z[k] = load_once"),
    ("missing vectors count as zeros", CU, "r_z[k].at[e] = round_to<T>(-kInf<A>)",
     "r_z[k].at[e] = round_to<T>(0)"),
    ("the rest one element short in the forward", CU,
     "n < split.rest(); n += blockDim.x) {\n    const A value",
     "n < split.rest() - 1; n += blockDim.x) {\n    const A value"),
    ("the rest taken from the front", CU, "n < before ? n : n + vecs * kN", "n"),
    ("misalignment of the wrong sign", CU, "(kN - past) % kN", "past % kN"),
    ("misalignment in bytes", CU, "reinterpret_cast<uintptr_t>(p) / sizeof(T) % kN",
     "reinterpret_cast<uintptr_t>(p) % kN"),
    # the loss
    ("logit of the next column", CU, "to_acc(logits[column])", "to_acc(logits[(column + 1) % V])"),
    ("label smoothing without the target's share", CU, "label_smoothing * (at_target - sum / V)",
     "label_smoothing * (-sum / V)"),
    ("mean over V - 1", CU, "(at_target - sum / V)", "(at_target - sum / (V - 1))"),
    ("sum of the logits without the rest", CU, "    if (kSmooth) sum += value;\n", ""),
    ("sum of the logits with missing ones", CU,
     "if (kSmooth && first + k * int(blockDim.x) < split.vecs)", "if (kSmooth)"),
    ("z-loss linear", CU, "z_loss * row_lse * row_lse", "z_loss * row_lse"),
    ("ignored rows read", CU, "  if (column == ignore_index) {  // so", "  if (false) {  // so"),
    ("targets out of range read", CU, "  if (column < 0 || column >= V) {\n", "  if (false) {\n"),
    ("no bound on rows in the forward", CU,
     "  if (i >= rows) return;  // a whole warp that shares its row with no other\n", ""),
    ("grid without the last rows", CU,
     "kernel<<<unsigned(ceil_div(rows, block.y)), block", "kernel<<<unsigned(rows / block.y), block"),
    # the backward
    ("gradient on the target without - 1", CU, "(p(z) - on_target) * dl", "p(z) * dl"),
    ("target one column on", CU, "on = column - split.vec(v)", "on = column - split.vec(v) + 1"),
    ("no target in the rest", CU, "dz = j == column ? gradient_on_target(logits[j]) : gradient",
     "dz = gradient"),
    ("gradient without the row's factor", CU, "dloss[i * dloss_stride] : A(NAN)", "dloss[0] : A(NAN)"),
    ("z-loss's gradient halved", CU, "dl * 2 * z_loss * row_lse", "dl * z_loss * row_lse"),
    ("z-loss forgotten on the target", CU, " + p(z) * of_z_loss);", ");"),
    ("smoothed share of the wrong sign", CU, "p(z) * scale - even", "p(z) * scale + even"),
    ("smoothing not taken from the target", CU,
     "A((1 - label_smoothing) + label_smoothing / V)", "A(1)"),
    ("quick exp for fp32", CU, "return sizeof(T) == 2 ? exp_quick(x) : exp(x)",
     "return exp_quick(x + A(1e-6))"),
    ("ignored rows left as they are", CU, "    store(dlogits + split.vec(v), r_dz);",
     "    if (counted) store(dlogits + split.vec(v), r_dz);"),
    ("the rest written by every chunk", CU, "  if (chunk > 0) return;\n", ""),
    ("the rest one element short in the backward", CU,
     "n < split.rest(); n += blockDim.x) {\n    const int j",
     "n < split.rest() - 1; n += blockDim.x) {\n    const int j"),
    ("gradient rows aligned otherwise taken for alike", CU, "bool alike = (static_cast<char*>(dlogits)"
     " - static_cast<const char*>(logits)) % 16 == 0;", "bool alike = true;"),
    ("strides of the rows not compared", CU,
     "(logits_rows.stride[d] - dense[d]) % kVec == 0", "true"),
    ("lse of the wrong row", CU, "row_lse = lse[i]", "row_lse = lse[blockIdx.x]"),
    ("rows shorter than a vector have no block", CU,
     "std::max<int64_t>(ceil_div(vecs, threads * kKeep), 1)", "ceil_div(vecs, threads * kKeep)"),
    # the mean
    ("mean over all rows", CU, "      counted += 1;\n    }", "    }\n  counted = double(rows) / "
     "kMeanThreads;"),
    ("rows beyond a block's threads missing", CU, "i < rows; i += kMeanThreads",
     "i < min(rows, int64_t(kMeanThreads)); i += kMeanThreads"),
    ("count and sum in one place", CU, "group_sum(counted, s_warps[1])", "group_sum(counted, s_warps[0])"),
]
