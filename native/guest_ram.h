// Guest RAM: a memfd, mapped shared, or a copy-on-write mapping of a file or of other RAM. Slots point into it.
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
  Napi::Value copyOnWrite(const Napi::CallbackInfo& info);
  Napi::Value privatePages(const Napi::CallbackInfo& info);
  Napi::Value discard(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  void map(Napi::Env env, size_t size, int flags);

  Fd fd_;
  /** Open from the first look at it on. */
  Fd pagemap_;
  std::shared_ptr<Mapping> mapping_;
  std::vector<std::unique_ptr<ExternalBuffer>> buffers_;
  /** Buffers at which collected ones are looked for. */
  size_t pruneAt_ = 64;
};
