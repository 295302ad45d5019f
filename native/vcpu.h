// One virtual processor: the ioctls of a vCPU file descriptor.
#pragma once

#include "linux_kvm.h"

#include "support.h"
#include "vm.h"

/** What a vCPU's thread, its JavaScript object and whoever kicks it share. */
struct VcpuState {
  VcpuState(int descriptor, std::shared_ptr<VmState> machine) : vm(std::move(machine)), fd(descriptor) {}

  kvm_run* run() const { return reinterpret_cast<kvm_run*>(mapping->data()); }
  /** KVM_RUN. Returns 0 or errno. */
  int enter();
  /** Makes the current or the next KVM_RUN return with EINTR. The signal to the thread is the caller's. */
  void requestExit() { __atomic_store_n(&run()->immediate_exit, 1, __ATOMIC_SEQ_CST); }
  void clearExitRequest() { __atomic_store_n(&run()->immediate_exit, 0, __ATOMIC_SEQ_CST); }

  std::shared_ptr<VmState> vm;
  Fd fd;
  /** `struct kvm_run`, the PIO data page and the VM's ring of coalesced writes. */
  std::shared_ptr<Mapping> mapping;
  /**
   * A VcpuThread is in KVM_RUN, or on its way in or out. Any other ioctl would wait for it, and with it the event
   * loop. Read and written by the JavaScript thread alone.
   */
  bool busy = false;
  /** The JavaScript object was closed: `run()` is gone. */
  bool closed = false;
};

class Vcpu : public Napi::ObjectWrap<Vcpu> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Vcpu(const Napi::CallbackInfo& info);

  std::shared_ptr<VcpuState> state() const { return state_; }

 private:
  int fd(Napi::Env env) const;
  Bytes xsaveArea(const Napi::CallbackInfo& info) const;
  template <typename T>
  Napi::Value structIoctl(const Napi::CallbackInfo& info, unsigned long request, const char* name);

  Napi::Value kvmRun(const Napi::CallbackInfo& info);
  Napi::Value run(const Napi::CallbackInfo& info);
  Napi::Value complete(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  Napi::Value getRegs(const Napi::CallbackInfo& info);
  Napi::Value setRegs(const Napi::CallbackInfo& info);
  Napi::Value getSregs(const Napi::CallbackInfo& info);
  Napi::Value setSregs(const Napi::CallbackInfo& info);
  Napi::Value getFpu(const Napi::CallbackInfo& info);
  Napi::Value setFpu(const Napi::CallbackInfo& info);
  Napi::Value getXsave(const Napi::CallbackInfo& info);
  Napi::Value setXsave(const Napi::CallbackInfo& info);
  Napi::Value getXcrs(const Napi::CallbackInfo& info);
  Napi::Value setXcrs(const Napi::CallbackInfo& info);
  Napi::Value getMsrs(const Napi::CallbackInfo& info);
  Napi::Value setMsrs(const Napi::CallbackInfo& info);
  Napi::Value getCpuid2(const Napi::CallbackInfo& info);
  Napi::Value setCpuid2(const Napi::CallbackInfo& info);
  Napi::Value getMpState(const Napi::CallbackInfo& info);
  Napi::Value setMpState(const Napi::CallbackInfo& info);
  Napi::Value getVcpuEvents(const Napi::CallbackInfo& info);
  Napi::Value setVcpuEvents(const Napi::CallbackInfo& info);
  Napi::Value getDebugRegs(const Napi::CallbackInfo& info);
  Napi::Value setDebugRegs(const Napi::CallbackInfo& info);
  Napi::Value setGuestDebug(const Napi::CallbackInfo& info);
  Napi::Value getLapic(const Napi::CallbackInfo& info);
  Napi::Value setLapic(const Napi::CallbackInfo& info);
  Napi::Value interrupt(const Napi::CallbackInfo& info);
  Napi::Value nmi(const Napi::CallbackInfo& info);
  Napi::Value translate(const Napi::CallbackInfo& info);
  Napi::Value getTscKhz(const Napi::CallbackInfo& info);
  Napi::Value setTscKhz(const Napi::CallbackInfo& info);
  Napi::Value kvmclockCtrl(const Napi::CallbackInfo& info);
  Napi::Value enableCap(const Napi::CallbackInfo& info);

  std::shared_ptr<VcpuState> state_;
  ExternalBuffer kvmRunBuffer_;
};
