// KVM_GET_MSRS and KVM_SET_MSRS take a list of any length; both /dev/kvm and a vCPU have them.
#pragma once

#include <cstring>
#include "linux_kvm.h"
#include <vector>

#include "support.h"

/** Runs the ioctl over the `struct kvm_msr_entry` in info[0], in place. Returns how many KVM took. */
inline Napi::Value msrsIoctl(const Napi::CallbackInfo& info, int fd, unsigned long request, const char* name) {
  auto entries = bytesOf(info[0], "entries");
  std::vector<uint8_t> buffer(sizeof(kvm_msrs) + entries.length);
  auto* list = reinterpret_cast<kvm_msrs*>(buffer.data());
  list->nmsrs = entries.length / sizeof(kvm_msr_entry);
  std::memcpy(list->entries, entries.data, entries.length);
  int done = ioctlRetry(fd, request, list);
  if (done < 0) throwErrno(info.Env(), name);
  std::memcpy(entries.data, list->entries, entries.length);
  return Napi::Number::New(info.Env(), done);
}
