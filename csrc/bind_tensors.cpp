#include "bind_tensors.h"

namespace nb = nanobind;

namespace {

// The part of DLPack's DLPackExchangeAPI (1.3) that is used here; its layout is a stable ABI.
struct ExchangeTable {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, nb::dlpack::dltensor* out);
};

struct Source {
  nb::handle type;  // torch.Tensor, kept for ever
  const ExchangeTable* table;
};

// Called under the GIL.
const Source& source() {
  static const Source found = [] {
    const nb::object type = nb::module_::import_("torch").attr("Tensor");
    const nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
    const ExchangeTable* table = nullptr;
    if (!capsule.is_none()) {
      table = static_cast<const ExchangeTable*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (table == nullptr) throw nb::python_error();
      if (table->version.major != 1) table = nullptr;
    }
    return Source{type.inc_ref(), table};
  }();
  return found;
}

constexpr std::int32_t kCPU = 1;

std::optional<gossamer::Dtype> dtype_of(const nb::dlpack::dtype& type) {
  using Code = nb::dlpack::dtype_code;
  if (type.code == static_cast<std::uint8_t>(Code::Bfloat)) return gossamer::Dtype::kBFloat16;
  if (type.code != static_cast<std::uint8_t>(Code::Float)) return std::nullopt;
  if (type.bits == 64) return gossamer::Dtype::kFloat64;
  return type.bits == 32 ? gossamer::Dtype::kFloat32 : gossamer::Dtype::kFloat16;
}

}  // namespace

std::optional<TensorRows> rows_of(nb::handle object) {
  const Source& from = source();
  if (from.table == nullptr || from.table->view_of_object == nullptr ||
      !nb::isinstance(object, from.type)) {
    return std::nullopt;
  }
  nb::dlpack::dltensor tensor;
  if (from.table->view_of_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();  // sparse, say: the caller goes the general way, which knows what to say
    return std::nullopt;
  }
  if (tensor.device.device_type != kCPU || tensor.ndim != 2 || tensor.dtype.lanes != 1 ||
      tensor.dtype.bits % 8 != 0 || tensor.strides == nullptr) {
    return std::nullopt;
  }
  const std::int64_t width = tensor.shape[1], stride = tensor.strides[0];
  if ((width > 1 && tensor.strides[1] != 1) || (tensor.shape[0] > 1 && stride < width)) {
    return std::nullopt;
  }
  const std::size_t element_bytes = tensor.dtype.bits / 8;
  return TensorRows{
      .address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset,
      .rows = static_cast<std::size_t>(tensor.shape[0]),
      .width = static_cast<std::size_t>(width),
      .stride = static_cast<std::size_t>(tensor.shape[0] > 1 ? stride : width) * element_bytes,
      .element_bytes = element_bytes,
      .kind = static_cast<std::uint16_t>(tensor.dtype.code << 8 | tensor.dtype.bits),
      .dtype = dtype_of(tensor.dtype),
  };
}
