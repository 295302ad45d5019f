#include "vcpu.h"

#include <sys/ioctl.h>
#include <sys/mman.h>
#include <cstring>
#include <vector>

#include "addon.h"
#include "msrs.h"

int VcpuState::enter() { return ioctl(fd.get(), KVM_RUN, 0) == 0 ? 0 : errno; }

Napi::Function Vcpu::define(Napi::Env env) {
  return DefineClass(env, "Vcpu",
                     {InstanceMethod<&Vcpu::kvmRun>("kvmRun"),
                      InstanceMethod<&Vcpu::run>("run"),
                      InstanceMethod<&Vcpu::complete>("complete"),
                      InstanceMethod<&Vcpu::close>("close"),
                      InstanceMethod<&Vcpu::getRegs>("getRegs"),
                      InstanceMethod<&Vcpu::setRegs>("setRegs"),
                      InstanceMethod<&Vcpu::getSregs>("getSregs"),
                      InstanceMethod<&Vcpu::setSregs>("setSregs"),
                      InstanceMethod<&Vcpu::getFpu>("getFpu"),
                      InstanceMethod<&Vcpu::setFpu>("setFpu"),
                      InstanceMethod<&Vcpu::getXsave>("getXsave"),
                      InstanceMethod<&Vcpu::setXsave>("setXsave"),
                      InstanceMethod<&Vcpu::getXcrs>("getXcrs"),
                      InstanceMethod<&Vcpu::setXcrs>("setXcrs"),
                      InstanceMethod<&Vcpu::getMsrs>("getMsrs"),
                      InstanceMethod<&Vcpu::setMsrs>("setMsrs"),
                      InstanceMethod<&Vcpu::getCpuid2>("getCpuid2"),
                      InstanceMethod<&Vcpu::setCpuid2>("setCpuid2"),
                      InstanceMethod<&Vcpu::getMpState>("getMpState"),
                      InstanceMethod<&Vcpu::setMpState>("setMpState"),
                      InstanceMethod<&Vcpu::getVcpuEvents>("getVcpuEvents"),
                      InstanceMethod<&Vcpu::setVcpuEvents>("setVcpuEvents"),
                      InstanceMethod<&Vcpu::getDebugRegs>("getDebugRegs"),
                      InstanceMethod<&Vcpu::setDebugRegs>("setDebugRegs"),
                      InstanceMethod<&Vcpu::setGuestDebug>("setGuestDebug"),
                      InstanceMethod<&Vcpu::getLapic>("getLapic"),
                      InstanceMethod<&Vcpu::setLapic>("setLapic"),
                      InstanceMethod<&Vcpu::interrupt>("interrupt"),
                      InstanceMethod<&Vcpu::nmi>("nmi"),
                      InstanceMethod<&Vcpu::translate>("translate"),
                      InstanceMethod<&Vcpu::getTscKhz>("getTscKhz"),
                      InstanceMethod<&Vcpu::setTscKhz>("setTscKhz"),
                      InstanceMethod<&Vcpu::kvmclockCtrl>("kvmclockCtrl"),
                      InstanceMethod<&Vcpu::enableCap>("enableCap")});
}

Vcpu::Vcpu(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Vcpu>(info) {
  Napi::Env env = info.Env();
  auto* vm = info[2].As<Napi::External<std::shared_ptr<VmState>>>().Data();
  state_ = std::make_shared<VcpuState>(info[0].As<Napi::Number>().Int32Value(), *vm);
  size_t size = uint32Of(info[1], "mapSize");
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, state_->fd.get(), 0);
  if (address == MAP_FAILED) throwErrno(env, "mmap(kvm_run)");
  state_->mapping = std::make_shared<Mapping>(address, size);
  kvmRunBuffer_.create(env, state_->mapping, 0, size, true);
}

int Vcpu::fd(Napi::Env env) const {
  if (!state_) throwClosed(env, "Vcpu");
  if (state_->busy) throwErrno(env, "ioctl(vcpu)", EBUSY);
  return state_->fd.get();
}

template <typename T>
Napi::Value Vcpu::structIoctl(const Napi::CallbackInfo& info, unsigned long request, const char* name) {
  if (ioctlRetry(fd(info.Env()), request, structOf(info[0], sizeof(T), name)) < 0) throwErrno(info.Env(), name);
  return info.Env().Undefined();
}

// kvmRun(): the ArrayBuffer over `struct kvm_run`, where exits are read in place. close() detaches it.
Napi::Value Vcpu::kvmRun(const Napi::CallbackInfo& info) {
  fd(info.Env());
  return kvmRunBuffer_.value();
}

// run(): KVM_RUN on this thread. Returns 0 for an exit, or EINTR or EAGAIN, which are no failures.
Napi::Value Vcpu::run(const Napi::CallbackInfo& info) {
  fd(info.Env());
  int error = state_->enter();
  if (error == EINTR) state_->clearExitRequest();
  if (error != 0 && error != EINTR && error != EAGAIN) throwErrno(info.Env(), "KVM_RUN", error);
  return Napi::Number::New(info.Env(), error);
}

// complete(): finishes the access that the last exit was for (a read's value reaches its register, rip moves on)
// without running the guest further. Returns 0 if that led to another exit, otherwise EINTR.
Napi::Value Vcpu::complete(const Napi::CallbackInfo& info) {
  fd(info.Env());
  state_->requestExit();
  auto result = run(info);
  state_->clearExitRequest();
  return result;
}

Napi::Value Vcpu::close(const Napi::CallbackInfo& info) {
  if (state_) {
    fd(info.Env());
    state_->closed = true;
    kvmRunBuffer_.detach();
    // The mapping is a reference to the vCPU in the kernel, and finalizers of detached buffers come late.
    state_->mapping->unmap();
    state_.reset();
  }
  return info.Env().Undefined();
}

Napi::Value Vcpu::getRegs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_regs>(info, KVM_GET_REGS, "KVM_GET_REGS");
}

Napi::Value Vcpu::setRegs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_regs>(info, KVM_SET_REGS, "KVM_SET_REGS");
}

Napi::Value Vcpu::getSregs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_sregs>(info, KVM_GET_SREGS, "KVM_GET_SREGS");
}

Napi::Value Vcpu::setSregs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_sregs>(info, KVM_SET_SREGS, "KVM_SET_SREGS");
}

Napi::Value Vcpu::getFpu(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_fpu>(info, KVM_GET_FPU, "KVM_GET_FPU");
}

Napi::Value Vcpu::setFpu(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_fpu>(info, KVM_SET_FPU, "KVM_SET_FPU");
}

// The area's size is KVM_CAP_XSAVE2's value, at least 4096: KVM takes it as given.
Bytes Vcpu::xsaveArea(const Napi::CallbackInfo& info) const {
  auto area = bytesOf(info[0], "area");
  fd(info.Env());
  int needed = ioctlRetry(state_->vm->fd.get(), KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
  size_t size = needed > static_cast<int>(sizeof(kvm_xsave)) ? static_cast<size_t>(needed) : sizeof(kvm_xsave);
  if (area.length < size) {
    throw Napi::RangeError::New(info.Env(), "Expected at least " + std::to_string(size) + " bytes for area");
  }
  return {area.data, size};
}

// getXsave(area)
Napi::Value Vcpu::getXsave(const Napi::CallbackInfo& info) {
  auto area = xsaveArea(info);
  bool large = area.length > sizeof(kvm_xsave);
  const char* name = large ? "KVM_GET_XSAVE2" : "KVM_GET_XSAVE";
  if (ioctlRetry(fd(info.Env()), large ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, area.data) != 0) throwErrno(info.Env(), name);
  return info.Env().Undefined();
}

// setXsave(area)
Napi::Value Vcpu::setXsave(const Napi::CallbackInfo& info) {
  auto area = xsaveArea(info);
  if (ioctlRetry(fd(info.Env()), KVM_SET_XSAVE, area.data) != 0) throwErrno(info.Env(), "KVM_SET_XSAVE");
  return info.Env().Undefined();
}

Napi::Value Vcpu::getXcrs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_xcrs>(info, KVM_GET_XCRS, "KVM_GET_XCRS");
}

Napi::Value Vcpu::setXcrs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_xcrs>(info, KVM_SET_XCRS, "KVM_SET_XCRS");
}

Napi::Value Vcpu::getMsrs(const Napi::CallbackInfo& info) {
  return msrsIoctl(info, fd(info.Env()), KVM_GET_MSRS, "KVM_GET_MSRS");
}

Napi::Value Vcpu::setMsrs(const Napi::CallbackInfo& info) {
  return msrsIoctl(info, fd(info.Env()), KVM_SET_MSRS, "KVM_SET_MSRS");
}

Napi::Value Vcpu::getCpuid2(const Napi::CallbackInfo& info) {
  std::vector<uint8_t> buffer(sizeof(kvm_cpuid2) + 256 * sizeof(kvm_cpuid_entry2));
  auto* list = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  list->nent = 256;
  if (ioctlRetry(fd(info.Env()), KVM_GET_CPUID2, list) != 0) throwErrno(info.Env(), "KVM_GET_CPUID2");
  // Before Linux 6.2 the kernel does not say how many there are: it leaves those behind the last one as they were.
  size_t count = list->nent;
  static const kvm_cpuid_entry2 none = {};
  while (count > 0 && std::memcmp(&list->entries[count - 1], &none, sizeof none) == 0) count--;
  return toBytes(info.Env(), list->entries, count * sizeof(kvm_cpuid_entry2));
}

Napi::Value Vcpu::setCpuid2(const Napi::CallbackInfo& info) {
  auto entries = bytesOf(info[0], "entries");
  std::vector<uint8_t> buffer(sizeof(kvm_cpuid2) + entries.length);
  auto* list = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  list->nent = entries.length / sizeof(kvm_cpuid_entry2);
  std::memcpy(list->entries, entries.data, entries.length);
  if (ioctlRetry(fd(info.Env()), KVM_SET_CPUID2, list) != 0) throwErrno(info.Env(), "KVM_SET_CPUID2");
  return info.Env().Undefined();
}

Napi::Value Vcpu::getMpState(const Napi::CallbackInfo& info) {
  kvm_mp_state state = {};
  if (ioctlRetry(fd(info.Env()), KVM_GET_MP_STATE, &state) != 0) throwErrno(info.Env(), "KVM_GET_MP_STATE");
  return Napi::Number::New(info.Env(), state.mp_state);
}

Napi::Value Vcpu::setMpState(const Napi::CallbackInfo& info) {
  kvm_mp_state state = {uint32Of(info[0], "state")};
  if (ioctlRetry(fd(info.Env()), KVM_SET_MP_STATE, &state) != 0) throwErrno(info.Env(), "KVM_SET_MP_STATE");
  return info.Env().Undefined();
}

Napi::Value Vcpu::getVcpuEvents(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_vcpu_events>(info, KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS");
}

Napi::Value Vcpu::setVcpuEvents(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_vcpu_events>(info, KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS");
}

Napi::Value Vcpu::getDebugRegs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_debugregs>(info, KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS");
}

Napi::Value Vcpu::setDebugRegs(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_debugregs>(info, KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS");
}

Napi::Value Vcpu::setGuestDebug(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_guest_debug>(info, KVM_SET_GUEST_DEBUG, "KVM_SET_GUEST_DEBUG");
}

Napi::Value Vcpu::getLapic(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_lapic_state>(info, KVM_GET_LAPIC, "KVM_GET_LAPIC");
}

Napi::Value Vcpu::setLapic(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_lapic_state>(info, KVM_SET_LAPIC, "KVM_SET_LAPIC");
}

Napi::Value Vcpu::interrupt(const Napi::CallbackInfo& info) {
  kvm_interrupt request = {uint32Of(info[0], "vector")};
  if (ioctlRetry(fd(info.Env()), KVM_INTERRUPT, &request) != 0) throwErrno(info.Env(), "KVM_INTERRUPT");
  return info.Env().Undefined();
}

Napi::Value Vcpu::nmi(const Napi::CallbackInfo& info) {
  if (ioctlRetry(fd(info.Env()), KVM_NMI, 0) != 0) throwErrno(info.Env(), "KVM_NMI");
  return info.Env().Undefined();
}

Napi::Value Vcpu::translate(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_translation>(info, KVM_TRANSLATE, "KVM_TRANSLATE");
}

Napi::Value Vcpu::getTscKhz(const Napi::CallbackInfo& info) {
  int khz = ioctlRetry(fd(info.Env()), KVM_GET_TSC_KHZ, 0);
  if (khz < 0) throwErrno(info.Env(), "KVM_GET_TSC_KHZ");
  return Napi::Number::New(info.Env(), khz);
}

Napi::Value Vcpu::setTscKhz(const Napi::CallbackInfo& info) {
  if (ioctlRetry(fd(info.Env()), KVM_SET_TSC_KHZ, static_cast<unsigned long>(uint32Of(info[0], "khz"))) != 0) {
    throwErrno(info.Env(), "KVM_SET_TSC_KHZ");
  }
  return info.Env().Undefined();
}

Napi::Value Vcpu::kvmclockCtrl(const Napi::CallbackInfo& info) {
  if (ioctlRetry(fd(info.Env()), KVM_KVMCLOCK_CTRL, 0) != 0) throwErrno(info.Env(), "KVM_KVMCLOCK_CTRL");
  return info.Env().Undefined();
}

Napi::Value Vcpu::enableCap(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_enable_cap>(info, KVM_ENABLE_CAP, "KVM_ENABLE_CAP");
}
