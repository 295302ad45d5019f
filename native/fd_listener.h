// Calls a JavaScript function from the event loop whenever a file descriptor is readable.
#pragma once

#include <memory>

#include "support.h"

class FdListener {
 public:
  /** `fd` must stay open until stop(). A callback that does not read from it is called again at once. */
  void start(Napi::Env env, int fd, Napi::Function callback);
  /** @returns whether it listened */
  bool stop();
  /** The environment ends: only the libuv handle is closed. */
  void stopForExit();

 private:
  Napi::Env env_ = nullptr;
  std::unique_ptr<UvHandle<uv_poll_t, UV_POLL>> poll_;
  Napi::FunctionReference callback_;
};
