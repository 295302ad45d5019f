// One virtual machine: the ioctls of a VM file descriptor.
#pragma once

#include <map>

#include "support.h"

/**
 * What lives until the last of a VM and its vCPUs is closed. A vCPU's file descriptor keeps the VM alive in the
 * kernel, and a VM may touch its slots as long as it lives: they must not be unmapped before, since the addresses
 * could become something else's.
 */
struct VmState {
  explicit VmState(int descriptor) : fd(descriptor) {}
  Fd fd;
  struct Slot {
    std::shared_ptr<Mapping> mapping;
    uint64_t size;
  };
  std::map<uint32_t, Slot> slots;
};

class Vm : public Napi::ObjectWrap<Vm> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Vm(const Napi::CallbackInfo& info);

 private:
  int fd(Napi::Env env) const;
  Napi::Value done(const Napi::CallbackInfo& info, int result, const char* name) const;
  template <typename T>
  Napi::Value structIoctl(const Napi::CallbackInfo& info, unsigned long request, const char* name);

  Napi::Value checkExtension(const Napi::CallbackInfo& info);
  Napi::Value enableCap(const Napi::CallbackInfo& info);
  Napi::Value setUserMemoryRegion(const Napi::CallbackInfo& info);
  Napi::Value getDirtyLog(const Napi::CallbackInfo& info);
  Napi::Value clearDirtyLog(const Napi::CallbackInfo& info);
  Napi::Value setTssAddr(const Napi::CallbackInfo& info);
  Napi::Value setIdentityMapAddr(const Napi::CallbackInfo& info);
  Napi::Value setBootCpuId(const Napi::CallbackInfo& info);
  Napi::Value createVcpu(const Napi::CallbackInfo& info);
  Napi::Value createIrqchip(const Napi::CallbackInfo& info);
  Napi::Value getIrqchip(const Napi::CallbackInfo& info);
  Napi::Value setIrqchip(const Napi::CallbackInfo& info);
  Napi::Value createPit2(const Napi::CallbackInfo& info);
  Napi::Value getPit2(const Napi::CallbackInfo& info);
  Napi::Value setPit2(const Napi::CallbackInfo& info);
  Napi::Value irqLine(const Napi::CallbackInfo& info);
  Napi::Value setGsiRouting(const Napi::CallbackInfo& info);
  Napi::Value signalMsi(const Napi::CallbackInfo& info);
  Napi::Value irqfd(const Napi::CallbackInfo& info);
  Napi::Value ioeventfd(const Napi::CallbackInfo& info);
  Napi::Value coalescedZone(const Napi::CallbackInfo& info);
  Napi::Value getClock(const Napi::CallbackInfo& info);
  Napi::Value setClock(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<VmState> state_;
  size_t vcpuMapSize_;
};
