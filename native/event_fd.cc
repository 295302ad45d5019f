#include "event_fd.h"

#include <sys/eventfd.h>

Napi::Function EventFd::define(Napi::Env env) {
  return DefineClass(env, "EventFd",
                     {InstanceMethod<&EventFd::fd>("fd"), InstanceMethod<&EventFd::signal>("signal"),
                      InstanceMethod<&EventFd::read>("read"), InstanceMethod<&EventFd::listen>("listen"), InstanceMethod<&EventFd::unlisten>("unlisten"),
                      InstanceMethod<&EventFd::close>("close")});
}

EventFd::EventFd(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<EventFd>(info), fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!fd_.open()) throwErrno(info.Env(), "eventfd");
  addonOf(info.Env()).add(this);
}

EventFd::~EventFd() {
  if (auto* addon = Env().GetInstanceData<Addon>()) addon->remove(this);
}

Napi::Value EventFd::fd(const Napi::CallbackInfo& info) {
  if (!fd_.open()) throwClosed(info.Env(), "EventFd");
  return Napi::Number::New(info.Env(), fd_.get());
}

Napi::Value EventFd::signal(const Napi::CallbackInfo& info) {
  if (!fd_.open()) throwClosed(info.Env(), "EventFd");
  uint64_t one = 1;
  // EAGAIN: the counter is full, so the event is already pending.
  if (write(fd_.get(), &one, sizeof one) < 0 && errno != EAGAIN) throwErrno(info.Env(), "write(eventfd)");
  return info.Env().Undefined();
}

Napi::Value EventFd::read(const Napi::CallbackInfo& info) {
  if (!fd_.open()) throwClosed(info.Env(), "EventFd");
  uint64_t count = 0;
  if (::read(fd_.get(), &count, sizeof count) < 0 && errno != EAGAIN) throwErrno(info.Env(), "read(eventfd)");
  return Napi::Number::New(info.Env(), static_cast<double>(count));
}

// listen(callback): calls it from the event loop each time the eventfd is readable; the callback reads it.
Napi::Value EventFd::listen(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!fd_.open()) throwClosed(env, "EventFd");
  unlisten(info);
  listener_ = Napi::Persistent(info[0].As<Napi::Function>());
  poll_ = std::make_unique<UvHandle<uv_poll_t, UV_POLL>>();
  int error = uv_poll_init(addonOf(env).loop(), poll_->get(), fd_.get());
  if (error != 0) throwErrno(env, "uv_poll_init", -error);
  poll_->initialized(this);
  uv_poll_start(poll_->get(), UV_READABLE, [](uv_poll_t* handle, int, int) {
    auto* self = static_cast<EventFd*>(uv_handle_get_data(reinterpret_cast<uv_handle_t*>(handle)));
    Napi::HandleScope scope(self->Env());
    callFromLoop(self->Env(), self->listener_, 0, nullptr);
  });
  Ref();
  return env.Undefined();
}

void EventFd::stopForExit() {
  if (poll_) poll_->close();
}

Napi::Value EventFd::unlisten(const Napi::CallbackInfo& info) {
  if (poll_) {
    poll_.reset();
    listener_.Reset();
    Unref();
  }
  return info.Env().Undefined();
}

Napi::Value EventFd::close(const Napi::CallbackInfo& info) {
  unlisten(info);
  fd_.reset();
  return info.Env().Undefined();
}
