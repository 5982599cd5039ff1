// A CUDA device for tensors without values: what torch's C++ code asks a CUDA build for.
//
// megatron_chatflow/simulate/shim.py compiles this file against the installed torch and loads it
// into the process that simulates a rank. torch's autograd engine asks for a device guard wherever
// a tensor says that it lies on CUDA, and `pin_memory` asks for the allocator of page-locked
// memory. Nothing here computes.
//
// torch's CUDA build registers its own guard and hooks while it is imported, which is after this
// library. Its hooks do not replace these, which have a higher priority. Its guard does, and is in
// turn replaced by `register_guard`.
//
// Methods that not every supported torch declares are written without `override`, and those that
// some declare `noexcept` with it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <memory>
#include <mutex>

namespace {

constexpr c10::DeviceIndex kNumDevices = 8;
c10::DeviceIndex current_device = 0;

// Page-locked memory is ordinary memory here. Its addresses are kept, so that `is_pinned` answers
// as on a machine with a GPU.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    auto memory = std::make_unique<c10::DataPtr>(c10::GetCPUAllocator()->allocate(num_bytes));
    void* data = memory->get();
    {
      const std::lock_guard<std::mutex> lock(mutex());
      blocks()[data] = num_bytes;
    }
    return {data, memory.release(), &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* target, const void* source, std::size_t count) const {
    default_copy_data(target, source, count);
  }

  static bool contains(const void* address) {
    const std::lock_guard<std::mutex> lock(mutex());
    auto block = blocks().upper_bound(address);
    if (block == blocks().begin()) {
      return false;
    }
    --block;
    return static_cast<const char*>(address) <
           static_cast<const char*>(block->first) + block->second;
  }

 private:
  static void release(void* context) {
    const std::unique_ptr<c10::DataPtr> memory(static_cast<c10::DataPtr*>(context));
    const std::lock_guard<std::mutex> lock(mutex());
    blocks().erase(memory->get());
  }

  // Never destroyed: tensors may outlive the statics of this library.
  static std::map<const void*, size_t>& blocks() {
    static auto* blocks = new std::map<const void*, size_t>;
    return *blocks;
  }

  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
};

PinnedAllocator pinned_allocator;

}  // namespace

namespace c10::impl {

struct SimulatedGuard final : DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;

  static Device here() { return Device(static_type, current_device); }
  static Stream stream() { return Stream(Stream::DEFAULT, here()); }

  DeviceType type() const override { return static_type; }
  // A process uses one device; the engine's threads switch to it and back.
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};

}  // namespace c10::impl

namespace at {

// The registry looks for a class of this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  DeviceIndex current_device() const { return ::current_device; }
  DeviceIndex getCurrentDevice() const { return ::current_device; }
  DeviceIndex deviceCount() const { return kNumDevices; }
  int getNumGPUs() const override { return kNumDevices; }
  bool isPinnedPtr(const void* data) const { return PinnedAllocator::contains(data); }
  Allocator* getPinnedMemoryAllocator() const { return &pinned_allocator; }
  // Values do not matter, the number of generators and their seeds do.
  const Generator& getDefaultGenerator(DeviceIndex) const {
    return at::detail::getDefaultCPUGenerator();
  }
};

C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)

}  // namespace at

extern "C" {

void register_guard() {
  // torch keeps the guard until the process ends.
  const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA,
                                                      new c10::impl::SimulatedGuard);
}

void set_current_device(int device) { current_device = static_cast<c10::DeviceIndex>(device); }

}  // extern "C"
