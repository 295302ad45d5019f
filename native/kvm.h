// /dev/kvm: the system ioctls.
#pragma once

#include "support.h"

class Kvm : public Napi::ObjectWrap<Kvm> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Kvm(const Napi::CallbackInfo& info);

 private:
  int fd(Napi::Env env) const;
  Napi::Value apiVersion(const Napi::CallbackInfo& info);
  Napi::Value checkExtension(const Napi::CallbackInfo& info);
  Napi::Value createVm(const Napi::CallbackInfo& info);
  Napi::Value getSupportedCpuid(const Napi::CallbackInfo& info);
  Napi::Value getEmulatedCpuid(const Napi::CallbackInfo& info);
  Napi::Value getMsrIndexList(const Napi::CallbackInfo& info);
  Napi::Value getMsrFeatureIndexList(const Napi::CallbackInfo& info);
  Napi::Value getMsrs(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  Napi::Value cpuidList(const Napi::CallbackInfo& info, unsigned long request, const char* name);
  Napi::Value msrList(const Napi::CallbackInfo& info, unsigned long request, const char* name);

  Fd fd_;
};
