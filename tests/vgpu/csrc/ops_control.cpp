// Control flow and order: bra brx exit ret trap call, bar barrier membar fence nanosleep.
#include <algorithm>

#include "decode.h"

namespace vgpu {

void reschedule(Warp& w) {
  if (w.active) w.groups.push_back({w.pc, w.active, false});
  w.active = 0;
  w.merge_pc = ~0u;
  uint32_t pc = ~0u;
  for (const Group& g : w.groups)
    if (!g.parked) pc = std::min(pc, g.pc);
  if (pc == ~0u) return;
  w.pc = pc;
  std::erase_if(w.groups, [&](const Group& g) {
    if (g.pc == pc) w.active |= g.lanes;
    return g.pc == pc;
  });
  for (const Group& g : w.groups)
    if (g.pc > pc) w.merge_pc = std::min(w.merge_pc, g.pc);
}

bool converge(Warp& w, const Instr& in, uint32_t members) {
  const uint32_t missing = members & w.alive & ~w.exec;
  if (!missing) return true;
  w.groups.push_back({w.pc - 1, w.exec, true});
  w.active &= ~w.exec;
  reschedule(w);
  if (!w.active)
    fault(w, in, std::countr_zero(w.exec),
          "divergence: waits for lane " + std::to_string(std::countr_zero(missing)) +
              " of its warp, which waits elsewhere and never comes here");
  return false;
}

namespace {

// The lanes of `taken` go to `target`, the others of the group on.
void jump(Warp& w, uint32_t taken, uint32_t target) {
  if (taken == w.active) {
    w.pc = target;
    if (!w.groups.empty()) reschedule(w);
    return;
  }
  w.active &= ~taken;
  w.groups.push_back({target, taken, false});
  reschedule(w);
}

void bra(Warp& w, const Instr& in) { jump(w, w.exec, in.target); }

void brx(Warp& w, const Instr& in) {
  const std::vector<uint32_t>& table = w.block->kernel->tables[in.target];
  const uint32_t* index = w.src<uint32_t>(in.a);
  const uint32_t exec = w.exec, first = index[std::countr_zero(exec)];
  each_executing(w, [&](int i) {
    if (index[i] >= table.size()) fault(w, in, i, "brx.idx beyond the table");
  });
  const uint32_t same = exec & lane_mask([&](int i) { return index[i] == first; });
  if (same != exec) {  // the others come back to this instruction
    w.groups.push_back({w.pc - 1, exec & ~same, false});
    w.active &= ~(exec & ~same);
  }
  jump(w, same, table[first]);
}

void exit_lanes(Warp& w, const Instr&) {
  w.alive &= ~w.exec;
  w.active &= ~w.exec;
  for (Group& g : w.groups) g.parked = false;  // what they waited for may be gone
  if (w.active) return;
  if (w.groups.empty()) {
    w.state = Warp::kDone;
    w.stop = true;
    return;
  }
  reschedule(w);
}

void trap(Warp& w, const Instr& in) {
  fault(w, in, std::countr_zero(w.exec), "the kernel trapped (an assertion failed, or trap)");
}

void nothing(Warp&, const Instr&) {}

void fence(Warp& w, const Instr&) { w.block->fence_interval = int64_t(w.block->interval); }

// mode: 0 sync, 1 arrive, 2 red; a: barrier, b: threads or none; c: predicate; d: result;
// imm: of red: 0 popc, 1 and, 2 or.
void bar(Warp& w, const Instr& in) {
  const int lane = std::countr_zero(w.exec);
  if (w.alive != w.lanes)
    fault(w, in, lane, "a barrier that thread " +
                           std::to_string(w.index * 32 + std::countr_zero(w.lanes & ~w.alive)) +
                           " of the block cannot reach: it has exited");
  if (!converge(w, in, w.lanes)) return;
  Block& b = *w.block;
  const uint32_t id = w.src<uint32_t>(in.a)[lane];
  const uint32_t whole = uint32_t(b.warps.size()) * kLanes;
  const uint32_t expected = in.b == kNoOperand ? whole : w.src<uint32_t>(in.b)[lane];
  if (id >= b.barriers.size()) fault(w, in, lane, "a barrier beyond the 16 there are");
  if (expected % kLanes || expected == 0)
    fault(w, in, lane, "a barrier for a number of threads that is not a multiple of 32");
  Barrier& barrier = b.barriers[id];
  if (barrier.arrived && barrier.expected != expected)
    fault(w, in, lane, "warps disagree on how many threads the barrier waits for");
  barrier.expected = expected;
  barrier.arrived += kLanes;
  if (in.mode == 2) {
    const uint32_t p = (w.pred(in.c) ^ (in.imm & 4 ? ~0u : 0)) & w.lanes;
    barrier.all = barrier.all && p == w.lanes;
    barrier.any = barrier.any || p;
    barrier.count += uint32_t(std::popcount(p));
  }
  if (in.mode != 1) {
    w.state = Warp::kAtBarrier;
    w.stop = true;
    barrier.waiting.push_back(&w);
  }
  if (barrier.arrived < expected) return;
  b.counters.barriers++;
  b.interval++;
  b.next_shared_interval();
  if (b.interval >= kMaxInterval) fault(w, in, lane, "more barriers than the engine can count");
  for (Warp* other : barrier.waiting) {
    other->state = Warp::kReady;
    const Instr& theirs = b.kernel->code[other->pc - 1];
    if (theirs.mode != 2) continue;
    const uint32_t exec = other->exec;
    other->exec = other->active;
    const uint32_t count = barrier.count;
    if ((theirs.imm & 3) == 0) each_lane<uint32_t>(*other, theirs.d, [=](int) { return count; });
    else other->set_pred(theirs.d, ((theirs.imm & 3) == 1 ? barrier.all : barrier.any) ? ~0u : 0);
    other->exec = exec;
  }
  barrier = Barrier{};
}

void bar_warp_sync(Warp& w, const Instr& in) {
  if (arrive_together(w, in, in.a, true)) w.sync_interval++;
}

bool decode_bar(Decode& d) {
  d.take("cta");
  d.in.pipe = Pipe::kOther;
  if (d.take("warp")) {
    d.take("sync");
    d.expect_operands(1);
    d.in.a = d.src(0, Type::kU32);
    d.in.run = bar_warp_sync;
    return true;
  }
  d.take("aligned");
  d.in.mode = d.take("sync") ? 0 : d.take("arrive") ? 1 : d.take("red") ? 2
              : (d.fail("unknown barrier"), 0);
  size_t first = 0, operands = d.s.operands.size();
  if (d.in.mode == 2) {
    d.in.imm = d.take("popc") ? 0 : d.take("and") ? 1 : d.take("or") ? 2
               : (d.fail("expected .popc, .and or .or"), 0);
    d.in.d = d.dst(0, d.type());
    first = 1;
    operands--;
    const ptx::Operand& p = d.s.operands.back();
    d.in.c = d.pred_src(p);
    if (p.negated) d.in.imm |= 4;
  }
  if (operands < 1 || operands > first + 2) d.fail("too many operands");
  d.in.a = d.src(first, Type::kU32);
  if (operands > first + 1) d.in.b = d.src(first + 1, Type::kU32);
  d.in.run = bar;
  return true;
}

}  // namespace

bool decode_control(Decode& d) {
  d.in.pipe = Pipe::kOther;
  if (d.is("bra")) {
    d.take("uni");
    d.expect_operands(1);
    d.in.target = d.label(d.s.operands[0].name);
    d.in.run = bra;
  } else if (d.is("brx")) {
    d.take("idx");
    d.take("uni");
    d.expect_operands(2);
    d.in.a = d.src(0, Type::kU32);
    std::vector<uint32_t> table;
    for (const std::string& name : d.branch_table(d.s.operands[1].name))
      table.push_back(d.label(name));
    d.in.target = uint32_t(d.builder.kernel.tables.size());
    d.builder.kernel.tables.push_back(table);
    d.in.run = brx;
  } else if (d.is("ret") || d.is("exit")) {
    d.take("uni");
    d.in.run = exit_lanes;
  } else if (d.is("trap") || d.is("brkpt")) {
    d.in.run = trap;
  } else if (d.is("call")) {
    d.take("uni");
    bool assertion = false, print = false;
    for (const ptx::Operand& o : d.s.operands) {
      assertion |= o.name == "__assertfail";
      print |= o.name == "vprintf";
    }
    if (!assertion && !print) d.fail("a call of an unknown function");
    d.in.run = assertion ? trap : nothing;
  } else if (d.is("bar") || d.is("barrier")) {
    return decode_bar(d);
  } else if (d.is("membar") || d.is("fence")) {
    for (const char* m : {"cta", "gl", "sys", "gpu", "sc", "acq_rel"}) d.take(m);
    d.in.run = fence;
  } else if (d.is("nanosleep") || d.is("pmevent")) {
    d.take("u32");
    d.in.run = nothing;
  } else {
    d.in.pipe = Pipe::kAlu;
    return false;
  }
  return true;
}

}  // namespace vgpu
