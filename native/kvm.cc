#include "kvm.h"

#include <fcntl.h>
#include "linux_kvm.h"
#include <vector>

#include "addon.h"
#include "msrs.h"
#include "vm.h"

Napi::Function Kvm::define(Napi::Env env) {
  return DefineClass(env, "Kvm",
                     {InstanceMethod<&Kvm::apiVersion>("apiVersion"),
                      InstanceMethod<&Kvm::checkExtension>("checkExtension"),
                      InstanceMethod<&Kvm::createVm>("createVm"),
                      InstanceMethod<&Kvm::getSupportedCpuid>("getSupportedCpuid"),
                      InstanceMethod<&Kvm::getEmulatedCpuid>("getEmulatedCpuid"),
                      InstanceMethod<&Kvm::getMsrIndexList>("getMsrIndexList"),
                      InstanceMethod<&Kvm::getMsrFeatureIndexList>("getMsrFeatureIndexList"),
                      InstanceMethod<&Kvm::getMsrs>("getMsrs"), InstanceMethod<&Kvm::close>("close")});
}

Kvm::Kvm(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Kvm>(info) {
  auto path = info[0].As<Napi::String>().Utf8Value();
  do {
    fd_.reset(open(path.c_str(), O_RDWR | O_CLOEXEC));
  } while (!fd_.open() && errno == EINTR);
  if (!fd_.open()) throwErrno(info.Env(), "open(/dev/kvm)");
}

int Kvm::fd(Napi::Env env) const {
  if (!fd_.open()) throwClosed(env, "Kvm");
  return fd_.get();
}

Napi::Value Kvm::apiVersion(const Napi::CallbackInfo& info) {
  int version = ioctlRetry(fd(info.Env()), KVM_GET_API_VERSION, 0);
  if (version < 0) throwErrno(info.Env(), "KVM_GET_API_VERSION");
  return Napi::Number::New(info.Env(), version);
}

Napi::Value Kvm::checkExtension(const Napi::CallbackInfo& info) {
  int value = ioctlRetry(fd(info.Env()), KVM_CHECK_EXTENSION, uint32Of(info[0], "capability"));
  if (value < 0) throwErrno(info.Env(), "KVM_CHECK_EXTENSION");
  return Napi::Number::New(info.Env(), value);
}

Napi::Value Kvm::createVm(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int vcpuMapSize = ioctlRetry(fd(env), KVM_GET_VCPU_MMAP_SIZE, 0);
  if (vcpuMapSize < 0) throwErrno(env, "KVM_GET_VCPU_MMAP_SIZE");
  int vm = ioctlRetry(fd(env), KVM_CREATE_VM, static_cast<unsigned long>(uint32Of(info[0], "type")));
  if (vm < 0) throwErrno(env, "KVM_CREATE_VM");
  return addonOf(env).vmClass.New({Napi::Number::New(env, vm), Napi::Number::New(env, vcpuMapSize)});
}

Napi::Value Kvm::cpuidList(const Napi::CallbackInfo& info, unsigned long request, const char* name) {
  // KVM says E2BIG until there is room for all entries.
  for (uint32_t count = 64; count <= 4096; count *= 2) {
    std::vector<uint8_t> buffer(sizeof(kvm_cpuid2) + count * sizeof(kvm_cpuid_entry2));
    auto* list = reinterpret_cast<kvm_cpuid2*>(buffer.data());
    list->nent = count;
    if (ioctlRetry(fd(info.Env()), request, list) == 0) {
      return toBytes(info.Env(), list->entries, list->nent * sizeof(kvm_cpuid_entry2));
    }
    if (errno != E2BIG) break;
  }
  throwErrno(info.Env(), name);
}

Napi::Value Kvm::getSupportedCpuid(const Napi::CallbackInfo& info) {
  return cpuidList(info, KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID");
}

Napi::Value Kvm::getEmulatedCpuid(const Napi::CallbackInfo& info) {
  return cpuidList(info, KVM_GET_EMULATED_CPUID, "KVM_GET_EMULATED_CPUID");
}

Napi::Value Kvm::msrList(const Napi::CallbackInfo& info, unsigned long request, const char* name) {
  kvm_msr_list empty = {};
  if (ioctlRetry(fd(info.Env()), request, &empty) != 0 && errno != E2BIG) throwErrno(info.Env(), name);
  std::vector<uint8_t> buffer(sizeof(kvm_msr_list) + empty.nmsrs * sizeof(uint32_t));
  auto* list = reinterpret_cast<kvm_msr_list*>(buffer.data());
  list->nmsrs = empty.nmsrs;
  if (ioctlRetry(fd(info.Env()), request, list) != 0) throwErrno(info.Env(), name);
  auto result = Napi::Uint32Array::New(info.Env(), list->nmsrs);
  for (uint32_t i = 0; i < list->nmsrs; i++) result[i] = list->indices[i];
  return result;
}

Napi::Value Kvm::getMsrIndexList(const Napi::CallbackInfo& info) {
  return msrList(info, KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST");
}

Napi::Value Kvm::getMsrFeatureIndexList(const Napi::CallbackInfo& info) {
  return msrList(info, KVM_GET_MSR_FEATURE_INDEX_LIST, "KVM_GET_MSR_FEATURE_INDEX_LIST");
}

Napi::Value Kvm::getMsrs(const Napi::CallbackInfo& info) {
  return msrsIoctl(info, fd(info.Env()), KVM_GET_MSRS, "KVM_GET_MSRS");
}

Napi::Value Kvm::close(const Napi::CallbackInfo& info) {
  fd_.reset();
  return info.Env().Undefined();
}
