// Runs guests on the JavaScript thread without starving its event loop: in slices, each before the loop polls.
#pragma once

#include "addon.h"
#include "spin.h"
#include "support.h"

class InlineLoop : public Napi::ObjectWrap<InlineLoop>, public Stoppable {
 public:
  static Napi::Function define(Napi::Env env);
  explicit InlineLoop(const Napi::CallbackInfo& info);
  ~InlineLoop() override;

  void stopForExit() override;

 private:
  Napi::Value start(const Napi::CallbackInfo& info);
  Napi::Value stop(const Napi::CallbackInfo& info);
  Napi::Value target(const Napi::CallbackInfo& info);
  Napi::Value limit(const Napi::CallbackInfo& info);
  Napi::Value linger(const Napi::CallbackInfo& info);
  Napi::Value control(const Napi::CallbackInfo& info);
  void halt();
  void onPrepare();

  Addon* addon_;
  Napi::FunctionReference slice_;
  ExternalBuffer control_;
  UvHandle<uv_prepare_t, UV_PREPARE> prepare_;
  UvHandle<uv_idle_t, UV_IDLE> idle_;
  bool running_ = false;
  uint64_t lastSliceEnd_ = 0;
  /** Slices in a row that ended before the guest was entered. */
  int skipped_ = 0;
  bool lingers_ = false;
  AdaptiveSpin lingering_;
};
