/*
 * The reap loop of "KVM: Dirty ring support" (QEMU, 2021), written anew after its description: the limit that
 * benchmarks/harvest.py measures ipc.compiled.calls.harvest against. gcc -O2.
 */
#include <stdint.h>

#define DIRTY 1u
#define RESET 2u
#define ADDRESS_SPACES 2u

struct dirty_gfn {
	uint32_t flags;
	uint32_t slot;		/* address space << 16 | slot id */
	uint64_t offset;	/* in pages */
};

struct slot {
	uint64_t *bitmap;
	uint64_t pages;		/* 0: not in use */
};

static void mark_page(struct slot *slots, uint32_t nr_slots, uint32_t as_id, uint32_t slot_id, uint64_t offset)
{
	struct slot *slot;

	if (as_id >= ADDRESS_SPACES || slot_id >= nr_slots)
		return;
	slot = &slots[slot_id];
	if (!slot->pages || offset >= slot->pages)
		return;
	slot->bitmap[offset / 64] |= (uint64_t)1 << (offset % 64);
}

/* Harvests until an entry is not dirty, at most `limit`; their number. `size` is a power of two. */
uint32_t reap_peer(struct dirty_gfn *ring, uint32_t size, uint32_t *fetch_index, uint32_t limit,
		   struct slot *slots, uint32_t nr_slots)
{
	uint32_t fetch = *fetch_index, count = 0;

	while (count < limit) {
		struct dirty_gfn *entry = &ring[fetch % size];

		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != DIRTY)
			break;
		mark_page(slots, nr_slots, entry->slot >> 16, entry->slot & 0xffff, entry->offset);
		__atomic_store_n(&entry->flags, RESET, __ATOMIC_RELEASE);
		fetch++;
		count++;
	}
	*fetch_index = fetch;
	return count;
}
