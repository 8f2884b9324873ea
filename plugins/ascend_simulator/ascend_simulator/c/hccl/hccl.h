// HCCL between processes of one machine: every collective is made of messages between pairs of ranks.
#ifndef ASCEND_SIMULATOR_HCCL_H
#define ASCEND_SIMULATOR_HCCL_H

#include <stddef.h>
#include <stdint.h>

typedef int32_t hccl_status;
enum { HCCL_OK = 0, HCCL_PARAMETER = 1, HCCL_MEMORY = 3, HCCL_INTERNAL = 4, HCCL_NOT_SUPPORTED = 5, HCCL_TIMEOUT = 9 };

enum { MAX_RANKS = 64, NAME_BYTES = 96 };

struct communicator {
    char name[NAME_BYTES];
    uint32_t num_ranks, rank;
    // Messages so far to and from each rank: the next message's number, so that pairs stay in order.
    uint64_t sent[MAX_RANKS], received[MAX_RANKS];
};

// From HcclDataType and HcclReduceOp.
enum hccl_type {
    INT8 = 0, INT16 = 1, INT32 = 2, FP16 = 3, FP32 = 4, INT64 = 5, UINT64 = 6, UINT8 = 7, UINT16 = 8, UINT32 = 9,
    FP64 = 10, BF16 = 11,
};
enum hccl_reduction { SUM = 0, PRODUCT = 1, MAXIMUM = 2, MINIMUM = 3 };

// Bytes of an element, 0 for a type that the simulator does not know.
size_t element_size(int type);

// into[i] = reduction(into[i], from[i]); fp16 and bf16 are widened to fp32 and rounded to nearest even each time.
hccl_status reduce_into(void *into, const void *from, size_t count, int type, int reduction);

// Leaves a message for rank `to`; never waits.
hccl_status send_message(struct communicator *comm, uint32_t to, const void *data, size_t size);

// Takes the next message from rank `from`, which must have exactly `size` bytes; waits for it.
hccl_status receive_message(struct communicator *comm, uint32_t from, void *data, size_t size);

#define TRY(call)                               \
    do {                                        \
        hccl_status status_ = (call);           \
        if (status_ != HCCL_OK) return status_; \
    } while (0)

#endif
