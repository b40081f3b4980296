package ext4

// extent is a run of blocks of the disk, holding the blocks of a file from
// logical on.
type extent struct {
	logical uint32
	start   int64
	count   int64
}

// allocator hands out blocks in ascending order, leaving out what belongs to
// superblock copies. Released runs of some size are used again; short ones are
// left free for the guest, so that a large file does not end in crumbs.
type allocator struct {
	next int64    // the first block never handed out
	free []extent // released runs, logical unused
	// reuse indexes the entries of free that are long enough to hand out.
	reuse []extent
}

// reuseBlocks is the shortest released run that is handed out again: 1 MiB.
const reuseBlocks = 256

func newAllocator() allocator { return allocator{next: superBlocks} }

// skip moves next past a superblock copy if it stands before one, and returns
// how many blocks follow before the next copy.
func (a *allocator) skip() int64 {
	g := a.next / groupBlocks
	if a.next%groupBlocks == 0 && hasSuper(g) {
		a.next += superBlocks
	}
	for g++; !hasSuper(g); g++ {
		if g*groupBlocks-a.next >= maxExtentLen {
			break
		}
	}
	return g*groupBlocks - a.next
}

// take returns a run of at most n blocks.
func (a *allocator) take(n int64) (start, got int64) {
	if k := len(a.reuse); k > 0 {
		r := &a.reuse[k-1]
		start, got = r.start, min(n, r.count)
		r.start, r.count = r.start+got, r.count-got
		if r.count == 0 {
			a.reuse = a.reuse[:k-1]
		}
		return start, got
	}
	got = min(n, a.skip(), maxExtentLen)
	start = a.next
	a.next += got
	return start, got
}

// takeRun returns a run of exactly n blocks, n at most half a group. What it
// passes over stays free.
func (a *allocator) takeRun(n int64) int64 {
	if left := a.skip(); left < n {
		a.free = append(a.free, extent{start: a.next, count: left})
		a.next += left
		a.skip()
	}
	start := a.next
	a.next += n
	return start
}

func (a *allocator) release(start, count int64) {
	r := extent{start: start, count: count}
	if count >= reuseBlocks {
		a.reuse = append(a.reuse, r)
		return
	}
	a.free = append(a.free, r)
}

// unused lists what is free below next.
func (a *allocator) unused() []extent { return append(a.free[:len(a.free):len(a.free)], a.reuse...) }
