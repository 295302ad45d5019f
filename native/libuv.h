// The part of libuv's ABI that the addon uses. Node.js exports libuv's functions, but the headers for Node-API
// do not declare them, and a machine with Node.js alone need not have uv.h. What stands here (the numbers of the
// handle types, `data` by accessor, sizes by uv_handle_size) is stable for all of libuv 1.x, see
// docs.libuv.org/en/v1.x/handle.html.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct uv_loop_s;
struct uv_handle_s;
typedef struct uv_loop_s uv_loop_t;
typedef struct uv_handle_s uv_handle_t;
typedef struct uv_async_s uv_async_t;
typedef struct uv_idle_s uv_idle_t;
typedef struct uv_poll_s uv_poll_t;
typedef struct uv_prepare_s uv_prepare_t;

typedef enum { UV_ASYNC = 1, UV_IDLE = 6, UV_POLL = 8, UV_PREPARE = 9 } uv_handle_type;
enum uv_poll_event { UV_READABLE = 1 };

typedef void (*uv_async_cb)(uv_async_t*);
typedef void (*uv_close_cb)(uv_handle_t*);
typedef void (*uv_idle_cb)(uv_idle_t*);
typedef void (*uv_poll_cb)(uv_poll_t*, int status, int events);
typedef void (*uv_prepare_cb)(uv_prepare_t*);

size_t uv_handle_size(uv_handle_type);
void* uv_handle_get_data(const uv_handle_t*);
void uv_handle_set_data(uv_handle_t*, void*);
void uv_close(uv_handle_t*, uv_close_cb);
void uv_ref(uv_handle_t*);
void uv_unref(uv_handle_t*);

int uv_backend_fd(const uv_loop_t*);
int uv_backend_timeout(const uv_loop_t*);
void uv_update_time(uv_loop_t*);
uint64_t uv_hrtime(void);

int uv_async_init(uv_loop_t*, uv_async_t*, uv_async_cb);
int uv_async_send(uv_async_t*);
int uv_idle_init(uv_loop_t*, uv_idle_t*);
int uv_idle_start(uv_idle_t*, uv_idle_cb);
int uv_idle_stop(uv_idle_t*);
int uv_poll_init(uv_loop_t*, uv_poll_t*, int fd);
int uv_poll_start(uv_poll_t*, int events, uv_poll_cb);
int uv_poll_stop(uv_poll_t*);
int uv_prepare_init(uv_loop_t*, uv_prepare_t*);
int uv_prepare_start(uv_prepare_t*, uv_prepare_cb);
int uv_prepare_stop(uv_prepare_t*);
}
