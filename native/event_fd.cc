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
  if (!fd_.open()) throwClosed(info.Env(), "EventFd");
  unlisten(info);
  listener_.start(info.Env(), fd_.get(), info[0].As<Napi::Function>());
  Ref();
  return info.Env().Undefined();
}

Napi::Value EventFd::unlisten(const Napi::CallbackInfo& info) {
  if (listener_.stop()) Unref();
  return info.Env().Undefined();
}

Napi::Value EventFd::close(const Napi::CallbackInfo& info) {
  unlisten(info);
  fd_.reset();
  return info.Env().Undefined();
}
