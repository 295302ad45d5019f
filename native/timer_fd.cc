#include "timer_fd.h"

#include <sys/timerfd.h>

Napi::Function TimerFd::define(Napi::Env env) {
  return DefineClass(env, "TimerFd",
                     {InstanceMethod<&TimerFd::arm>("arm"), InstanceMethod<&TimerFd::read>("read"),
                      InstanceMethod<&TimerFd::listen>("listen"), InstanceMethod<&TimerFd::unlisten>("unlisten"),
                      InstanceMethod<&TimerFd::close>("close")});
}

TimerFd::TimerFd(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<TimerFd>(info), fd_(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)) {
  if (!fd_.open()) throwErrno(info.Env(), "timerfd_create");
  addonOf(info.Env()).add(this);
}

TimerFd::~TimerFd() {
  if (auto* addon = Env().GetInstanceData<Addon>()) addon->remove(this);
}

static timespec timespecOf(double nanoseconds) {
  auto whole = static_cast<int64_t>(nanoseconds);
  return {whole / 1'000'000'000, whole % 1'000'000'000};
}

// arm(delay, interval): nanoseconds to the first expiration and between the others; 0 for none.
Napi::Value TimerFd::arm(const Napi::CallbackInfo& info) {
  if (!fd_.open()) throwClosed(info.Env(), "TimerFd");
  itimerspec when = {};
  when.it_value = timespecOf(info[0].As<Napi::Number>().DoubleValue());
  when.it_interval = timespecOf(info[1].As<Napi::Number>().DoubleValue());
  if (timerfd_settime(fd_.get(), 0, &when, nullptr) != 0) throwErrno(info.Env(), "timerfd_settime");
  return info.Env().Undefined();
}

// read(): the expirations since the last time.
Napi::Value TimerFd::read(const Napi::CallbackInfo& info) {
  if (!fd_.open()) throwClosed(info.Env(), "TimerFd");
  uint64_t count = 0;
  if (::read(fd_.get(), &count, sizeof count) < 0 && errno != EAGAIN) throwErrno(info.Env(), "read(timerfd)");
  return Napi::Number::New(info.Env(), static_cast<double>(count));
}

// listen(callback): calls it from the event loop each time the timer has expired; the callback reads it.
Napi::Value TimerFd::listen(const Napi::CallbackInfo& info) {
  if (!fd_.open()) throwClosed(info.Env(), "TimerFd");
  unlisten(info);
  listener_.start(info.Env(), fd_.get(), info[0].As<Napi::Function>());
  Ref();
  return info.Env().Undefined();
}

Napi::Value TimerFd::unlisten(const Napi::CallbackInfo& info) {
  if (listener_.stop()) Unref();
  return info.Env().Undefined();
}

Napi::Value TimerFd::close(const Napi::CallbackInfo& info) {
  unlisten(info);
  fd_.reset();
  return info.Env().Undefined();
}
