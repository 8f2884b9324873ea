// Streams and events. Work is done when it is launched, so a stream is always idle and a recorded event complete.
#include "simulator.h"

#include <stdlib.h>
#include <time.h>

struct stream {
    int32_t id;
};
struct event {
    double recorded_ms;
};

// From aclrtEventRecordedStatus, aclrtEventWaitStatus and aclrtStreamStatus.
enum { EVENT_RECORDED_COMPLETE = 1, EVENT_WAIT_COMPLETE = 0, STREAM_COMPLETE = 0 };

static acl_status create_stream(void **stream) {
    static int32_t num_streams;
    struct stream *created = malloc(sizeof *created);
    if (!created) return ACL_OUT_OF_MEMORY;
    created->id = __atomic_add_fetch(&num_streams, 1, __ATOMIC_RELAXED);
    *stream = created;
    return ACL_OK;
}

acl_status aclrtCreateStream(void **stream) { return create_stream(stream); }

acl_status aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) {
    (void)priority, (void)flags;
    return create_stream(stream);
}

acl_status aclrtStreamGetId(void *stream, int32_t *id) {
    *id = stream ? ((struct stream *)stream)->id : 0;
    return ACL_OK;
}

acl_status aclrtDestroyStream(void *stream) {
    free(stream);
    return ACL_OK;
}

acl_status aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }

acl_status aclrtStreamQuery(void *stream, int32_t *status) {
    (void)stream;
    *status = STREAM_COMPLETE;
    return ACL_OK;
}

acl_status aclrtCreateEventWithFlag(void **event, uint32_t flags) {
    (void)flags;
    *event = calloc(1, sizeof(struct event));
    return *event ? ACL_OK : ACL_OUT_OF_MEMORY;
}

acl_status aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return aclrtCreateEventWithFlag(event, flags); }

acl_status aclrtDestroyEvent(void *event) {
    free(event);
    return ACL_OK;
}

acl_status aclrtRecordEvent(void *event, void *stream) {
    (void)stream;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    ((struct event *)event)->recorded_ms = (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
    return ACL_OK;
}

acl_status aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    double elapsed = ((struct event *)end)->recorded_ms - ((struct event *)start)->recorded_ms;
    *milliseconds = (float)elapsed;
    return ACL_OK;
}

acl_status aclrtQueryEventStatus(void *event, int32_t *status) {
    (void)event;
    *status = EVENT_RECORDED_COMPLETE;
    return ACL_OK;
}

acl_status aclrtQueryEventWaitStatus(void *event, int32_t *status) {
    (void)event;
    *status = EVENT_WAIT_COMPLETE;
    return ACL_OK;
}
