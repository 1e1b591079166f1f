/* What BCC's helpers.h asks for: its BPF_STACK_TRACE rounds the number of entries up. */
#pragma once
#define roundup_pow_of_two(n) ((n) > 1 ? 1UL << (64 - __builtin_clzl((n) - 1UL)) : 1UL)
