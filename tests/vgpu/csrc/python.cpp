// The Python face's lower half; tests/vgpu/__init__.py is the upper one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "engine.h"

namespace py = pybind11;
using namespace vgpu;

namespace {

Dim dim(const std::tuple<uint32_t, uint32_t, uint32_t>& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t)};
}
py::tuple tuple(const Dim& d) { return py::make_tuple(d.x, d.y, d.z); }

}  // namespace

PYBIND11_MODULE(_engine, m) {
  static py::exception<Fault> fault(m, "Fault", PyExc_RuntimeError);
  py::register_exception<LoadError>(m, "LoadError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Fault& f) {
      py::object error = py::reinterpret_borrow<py::object>(fault.ptr())(f.what());
      error.attr("kernel") = f.kernel;
      error.attr("reason") = f.reason;
      error.attr("block") = tuple(f.block);
      error.attr("thread") = tuple(f.thread);
      error.attr("line") = f.line;
      error.attr("ptx") = f.ptx;
      error.attr("source") = f.source;
      PyErr_SetObject(fault.ptr(), error.ptr());
    }
  });

  py::class_<Module, std::shared_ptr<Module>>(m, "Module")
      .def("kernels", &Module::kernels)
      .def("static_shared", &Module::static_shared)
      .def("params", [](const Module& module, const std::string& kernel) {
        py::list params;
        for (const Param& p : module.params(kernel))
          params.append(py::make_tuple(p.type, p.bytes));
        return params;
      });

  using Dims = std::tuple<uint32_t, uint32_t, uint32_t>;
  py::class_<Device>(m, "Device")
      .def(py::init([](uint64_t seed, int threads, uint64_t limit) {
        return std::make_unique<Device>(Options{seed, threads, limit});
      }))
      .def("load", &Device::load)
      .def("add_memory", [](Device& d, uint64_t p, size_t bytes, bool initialised) {
        d.add_memory(reinterpret_cast<void*>(p), bytes, initialised);
      })
      .def("remove_memory", [](Device& d, uint64_t p) {
        d.remove_memory(reinterpret_cast<void*>(p));
      })
      .def("mark_memory", [](Device& d, uint64_t p, size_t bytes, bool initialised) {
        d.mark_memory(reinterpret_cast<void*>(p), bytes, initialised);
      })
      .def("launch", [](Device& d, const Module& module, const std::string& kernel, Dims grid,
                        Dims block, size_t shared, const std::vector<std::string>& args) {
        std::vector<const void*> pointers;
        for (const std::string& a : args) pointers.push_back(a.data());
        Stats stats;
        {
          const py::gil_scoped_release release;
          stats = d.launch(module, kernel, dim(grid), dim(block), shared, pointers.data());
        }
        py::dict result = py::cast(stats.counts);
        result["mma"] = stats.mma;
        result["seconds"] = stats.seconds;
        return result;
      });
}
