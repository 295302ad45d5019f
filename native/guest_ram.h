// Guest RAM: a memfd, mapped shared. Slots point into it, and copy-on-write forks can map it again.
#pragma once

#include <vector>

#include "support.h"

class GuestRam : public Napi::ObjectWrap<GuestRam> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit GuestRam(const Napi::CallbackInfo& info);
  ~GuestRam() override = default;

  std::shared_ptr<Mapping> mapping() const { return mapping_; }

 private:
  Napi::Value fd(const Napi::CallbackInfo& info);
  Napi::Value buffer(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  Fd fd_;
  std::shared_ptr<Mapping> mapping_;
  std::vector<std::unique_ptr<ExternalBuffer>> buffers_;
  /** Buffers at which collected ones are looked for. */
  size_t pruneAt_ = 64;
};
