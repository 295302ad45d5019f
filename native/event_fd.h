// An eventfd: KVM's doorbells (ioeventfd) and interrupts (irqfd), polled by libuv.
#pragma once

#include "addon.h"
#include "fd_listener.h"
#include "support.h"

class EventFd : public Napi::ObjectWrap<EventFd>, public Stoppable {
 public:
  static Napi::Function define(Napi::Env env);
  explicit EventFd(const Napi::CallbackInfo& info);
  ~EventFd() override;

  void stopForExit() override { listener_.stopForExit(); }

 private:
  Napi::Value fd(const Napi::CallbackInfo& info);
  Napi::Value signal(const Napi::CallbackInfo& info);
  Napi::Value read(const Napi::CallbackInfo& info);
  Napi::Value listen(const Napi::CallbackInfo& info);
  Napi::Value unlisten(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  Fd fd_;
  FdListener listener_;
};
