// SPDX-License-Identifier: GPL-2.0-only
/* Global variables of every type that can be set before loading; the program copies what it was
 * told into a map, so that a test sees what the kernel got.  Run by BPF_PROG_TEST_RUN. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

enum mode { OFF, SLOW = 5, FAST = -2 };
enum wide { SMALL = 1, HUGE_ONE = 0x1234567890ULL };

struct limits {
    __u32 low;
    __u16 ports[2];
    struct {
        __u8 a, b;
    } inner;
    __u32 three : 3;
};

const volatile bool verbose = false;
const volatile char letter = 'x';
const volatile __s8 a_s8 = 0;
const volatile __u8 a_u8 = 0;
const volatile __s16 a_s16 = 0;
const volatile __u16 a_u16 = 0;
const volatile __s32 a_s32 = 0;
const volatile __u32 a_u32 = 0;
const volatile __s64 a_s64 = 0;
const volatile __u64 a_u64 = 0;
const volatile char name[8] = "none";
const volatile enum mode mode = OFF;
const volatile enum wide width = SMALL;
const volatile __u32 numbers[4] = {1, 2, 3, 4};
const volatile struct limits limits = {.low = 7};
const volatile void *volatile pointer = 0;
static volatile const __u32 hidden = 3;
__u32 in_data = 17;
__u32 in_bss;

struct seen {
    bool verbose;
    char letter;
    __s8 a_s8;
    __u8 a_u8;
    __s16 a_s16;
    __u16 a_u16;
    __s32 a_s32;
    __u32 a_u32;
    __s64 a_s64;
    __u64 a_u64;
    char name[8];
    enum mode mode;
    enum wide width;
    __u32 numbers[4];
    __u32 low, port, inner_b, hidden, in_data, in_bss;
};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct seen);
} results SEC(".maps");

SEC("xdp")
int show_settings(struct xdp_md *ctx)
{
    __u32 slot = 0;
    struct seen *seen = bpf_map_lookup_elem(&results, &slot);

    if (!seen)
        return XDP_PASS;
    seen->verbose = verbose;
    seen->letter = letter;
    seen->a_s8 = a_s8;
    seen->a_u8 = a_u8;
    seen->a_s16 = a_s16;
    seen->a_u16 = a_u16;
    seen->a_s32 = a_s32;
    seen->a_u32 = a_u32;
    seen->a_s64 = a_s64;
    seen->a_u64 = a_u64;
    for (int i = 0; i < 8; i++)
        seen->name[i] = name[i];
    seen->mode = mode;
    seen->width = width;
    for (int i = 0; i < 4; i++)
        seen->numbers[i] = numbers[i];
    seen->low = limits.low;
    seen->port = limits.ports[1];
    seen->inner_b = limits.inner.b;
    seen->hidden = hidden;
    seen->in_data = in_data++;
    seen->in_bss = in_bss++;
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
