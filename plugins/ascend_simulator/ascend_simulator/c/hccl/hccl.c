// Communicators and collectives, with the signatures of CANN's hccl.h. All of them complete before they return.
#include "hccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// sizeof(HcclRootInfo); torch_npu sends all of it to the other ranks.
enum { ROOT_INFO_BYTES = 4108 };

hccl_status HcclGetRootInfo(char *info) {
    static uint32_t number;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(info, 0, ROOT_INFO_BYTES);
    snprintf(info, NAME_BYTES, "ascend-simulator-%d-%lld-%ld-%u", (int)getpid(), (long long)now.tv_sec, now.tv_nsec,
             __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED));
    return HCCL_OK;
}

hccl_status HcclCommInitRootInfo(uint32_t num_ranks, const char *info, uint32_t rank, struct communicator **result) {
    if (num_ranks == 0 || num_ranks > MAX_RANKS || rank >= num_ranks) return HCCL_PARAMETER;
    struct communicator *comm = calloc(1, sizeof *comm);
    if (!comm) return HCCL_MEMORY;
    snprintf(comm->name, NAME_BYTES, "%.*s", NAME_BYTES - 1, info);
    comm->num_ranks = num_ranks;
    comm->rank = rank;
    *result = comm;
    return HCCL_OK;
}

// `config` holds buffer sizes and a deterministic switch; sums here are in the order of ranks anyway.
hccl_status HcclCommInitRootInfoConfig(uint32_t num_ranks, const char *info, uint32_t rank, const void *config,
                                       struct communicator **result) {
    (void)config;
    return HcclCommInitRootInfo(num_ranks, info, rank, result);
}

hccl_status HcclCommDestroy(struct communicator *comm) {
    free(comm);
    return HCCL_OK;
}

hccl_status HcclGetCommName(const struct communicator *comm, char *name) {
    memcpy(name, comm->name, NAME_BYTES);
    return HCCL_OK;
}

hccl_status HcclGetCommAsyncError(struct communicator *comm, hccl_status *error) {
    (void)comm;
    *error = HCCL_OK;
    return HCCL_OK;
}

// No optional configuration is supported.
uint32_t HcclGetCommConfigCapability(void) { return 0; }

const char *HcclGetErrorString(hccl_status status) {
    switch (status) {
        case HCCL_OK: return "no error";
        case HCCL_PARAMETER: return "ascend simulator: ranks disagree about a collective's size or members";
        case HCCL_MEMORY: return "ascend simulator: no shared memory left";
        case HCCL_NOT_SUPPORTED: return "ascend simulator: data type or reduction not supported";
        case HCCL_TIMEOUT: return "ascend simulator: timed out (HCCL_EXEC_TIMEOUT) waiting for another rank";
        default: return "ascend simulator: internal error";
    }
}

// Receives every rank's contribution of `count` elements and reduces them into `to`, always in the order of ranks.
static hccl_status receive_reduced(struct communicator *comm, void *to, uint64_t count, int type, int reduction) {
    size_t size = count * element_size(type);
    TRY(receive_message(comm, 0, to, size));
    void *part = malloc(size + 1);
    if (!part) return HCCL_MEMORY;
    hccl_status status = HCCL_OK;
    for (uint32_t rank = 1; rank < comm->num_ranks && status == HCCL_OK; rank++) {
        status = receive_message(comm, rank, part, size);
        if (status == HCCL_OK) status = reduce_into(to, part, count, type, reduction);
    }
    free(part);
    return status;
}

static hccl_status send_to_all(struct communicator *comm, const void *data, size_t size) {
    for (uint32_t rank = 0; rank < comm->num_ranks; rank++) TRY(send_message(comm, rank, data, size));
    return HCCL_OK;
}

// Sends the i-th part to rank i.
static hccl_status send_parts(struct communicator *comm, const char *data, size_t size) {
    for (uint32_t rank = 0; rank < comm->num_ranks; rank++) TRY(send_message(comm, rank, data + rank * size, size));
    return HCCL_OK;
}

static hccl_status receive_parts(struct communicator *comm, char *data, size_t size) {
    for (uint32_t rank = 0; rank < comm->num_ranks; rank++) TRY(receive_message(comm, rank, data + rank * size, size));
    return HCCL_OK;
}

hccl_status HcclAllReduce(const void *from, void *to, uint64_t count, int type, int reduction,
                          struct communicator *comm, void *stream) {
    (void)stream;
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    TRY(send_to_all(comm, from, count * element_size(type)));
    return receive_reduced(comm, to, count, type, reduction);
}

hccl_status HcclReduce(const void *from, void *to, uint64_t count, int type, int reduction, uint32_t root,
                       struct communicator *comm, void *stream) {
    (void)stream;
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    TRY(send_message(comm, root, from, count * element_size(type)));
    return comm->rank == root ? receive_reduced(comm, to, count, type, reduction) : HCCL_OK;
}

// `count` is the result's.
hccl_status HcclReduceScatter(const char *from, void *to, uint64_t count, int type, int reduction,
                              struct communicator *comm, void *stream) {
    (void)stream;
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    TRY(send_parts(comm, from, count * element_size(type)));
    return receive_reduced(comm, to, count, type, reduction);
}

hccl_status HcclAllGather(const void *from, char *to, uint64_t count, int type, struct communicator *comm,
                          void *stream) {
    (void)stream;
    size_t size = count * element_size(type);
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    TRY(send_to_all(comm, from, size));
    return receive_parts(comm, to, size);
}

hccl_status HcclBroadcast(void *data, uint64_t count, int type, uint32_t root, struct communicator *comm,
                          void *stream) {
    (void)stream;
    size_t size = count * element_size(type);
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    if (comm->rank == root) TRY(send_to_all(comm, data, size));
    return receive_message(comm, root, data, size);
}

hccl_status HcclScatter(const char *from, void *to, uint64_t count, int type, uint32_t root,
                        struct communicator *comm, void *stream) {
    (void)stream;
    size_t size = count * element_size(type);
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    if (comm->rank == root) TRY(send_parts(comm, from, size));
    return receive_message(comm, root, to, size);
}

hccl_status HcclAlltoAll(const char *from, uint64_t send_count, int send_type, char *to, uint64_t receive_count,
                         int receive_type, struct communicator *comm, void *stream) {
    (void)stream;
    if (!element_size(send_type) || !element_size(receive_type)) return HCCL_NOT_SUPPORTED;
    TRY(send_parts(comm, from, send_count * element_size(send_type)));
    return receive_parts(comm, to, receive_count * element_size(receive_type));
}

// Counts and offsets are in elements.
hccl_status HcclAlltoAllV(const char *from, const uint64_t *send_counts, const uint64_t *send_offsets, int send_type,
                          char *to, const uint64_t *receive_counts, const uint64_t *receive_offsets, int receive_type,
                          struct communicator *comm, void *stream) {
    (void)stream;
    size_t out = element_size(send_type), in = element_size(receive_type);
    if (!out || !in) return HCCL_NOT_SUPPORTED;
    for (uint32_t rank = 0; rank < comm->num_ranks; rank++)
        TRY(send_message(comm, rank, from + send_offsets[rank] * out, send_counts[rank] * out));
    for (uint32_t rank = 0; rank < comm->num_ranks; rank++)
        TRY(receive_message(comm, rank, to + receive_offsets[rank] * in, receive_counts[rank] * in));
    return HCCL_OK;
}

hccl_status HcclSend(const void *data, uint64_t count, int type, uint32_t to, struct communicator *comm,
                     void *stream) {
    (void)stream;
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    return send_message(comm, to, data, count * element_size(type));
}

hccl_status HcclRecv(void *data, uint64_t count, int type, uint32_t from, struct communicator *comm, void *stream) {
    (void)stream;
    if (!element_size(type)) return HCCL_NOT_SUPPORTED;
    return receive_message(comm, from, data, count * element_size(type));
}

// HcclSendRecvItem.
struct transfer {
    int kind;
    void *data;
    uint64_t count;
    int type;
    uint32_t peer;
};
enum { TRANSFER_SEND = 0 };

// Sends first, whatever the order of the items: that is what makes a batch safe against waiting for each other.
hccl_status HcclBatchSendRecv(struct transfer *items, uint32_t num_items, struct communicator *comm, void *stream) {
    for (uint32_t i = 0; i < num_items; i++)
        if (items[i].kind == TRANSFER_SEND)
            TRY(HcclSend(items[i].data, items[i].count, items[i].type, items[i].peer, comm, stream));
    for (uint32_t i = 0; i < num_items; i++)
        if (items[i].kind != TRANSFER_SEND)
            TRY(HcclRecv(items[i].data, items[i].count, items[i].type, items[i].peer, comm, stream));
    return HCCL_OK;
}
