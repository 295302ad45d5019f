// A timerfd of the monotonic clock, polled by libuv: the timers of devices, finer than the loop's milliseconds.
#pragma once

#include "addon.h"
#include "fd_listener.h"
#include "support.h"

class TimerFd : public Napi::ObjectWrap<TimerFd>, public Stoppable {
 public:
  static Napi::Function define(Napi::Env env);
  explicit TimerFd(const Napi::CallbackInfo& info);
  ~TimerFd() override;

  void stopForExit() override { listener_.stopForExit(); }

 private:
  Napi::Value arm(const Napi::CallbackInfo& info);
  Napi::Value read(const Napi::CallbackInfo& info);
  Napi::Value listen(const Napi::CallbackInfo& info);
  Napi::Value unlisten(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  Fd fd_;
  FdListener listener_;
};
