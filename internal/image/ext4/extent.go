package ext4

const (
	extentMagic    = 0xF30A
	extentsInRoot  = 4
	extentsInBlock = (BlockSize - 12) / 12
	extentTail     = 12 + 12*extentsInBlock // where a tree block's checksum stands
)

// extentTree is the map of a file's blocks as it is stored: 60 bytes in the
// inode, and blocks below those when it is long.
type extentTree struct {
	root   [60]byte
	blocks []treeBlock
}

type treeBlock struct {
	number int64
	data   []byte // without checksum
}

// record is one slot of a tree node: an extent in a leaf, a pointer above.
type record struct {
	logical uint32
	count   int64 // 0 in a pointer
	block   int64
}

// makeTree lays xs out, taking the blocks it needs from take.
func makeTree(xs []extent, take func() int64) extentTree {
	var t extentTree
	level := make([]record, len(xs))
	for i, x := range xs {
		level[i] = record{x.logical, x.count, x.start}
	}
	depth := uint16(0)
	for ; len(level) > extentsInRoot; depth++ {
		var up []record
		for len(level) > 0 {
			n := min(len(level), extentsInBlock)
			b := treeBlock{take(), make([]byte, BlockSize)}
			putRecords(b.data, level[:n], extentsInBlock, depth)
			t.blocks = append(t.blocks, b)
			up = append(up, record{logical: level[0].logical, block: b.number})
			level = level[n:]
		}
		level = up
	}
	putRecords(t.root[:], level, extentsInRoot, depth)
	return t
}

func putRecords(p []byte, rs []record, room, depth uint16) {
	le.PutUint16(p[0:], extentMagic)
	le.PutUint16(p[2:], uint16(len(rs)))
	le.PutUint16(p[4:], room)
	le.PutUint16(p[6:], depth)
	for i, r := range rs {
		q := p[12+12*i:]
		le.PutUint32(q, r.logical)
		if depth == 0 {
			le.PutUint16(q[4:], uint16(r.count))
			le.PutUint16(q[6:], uint16(r.block>>32))
			le.PutUint32(q[8:], uint32(r.block))
			continue
		}
		le.PutUint32(q[4:], uint32(r.block))
		le.PutUint16(q[8:], uint16(r.block>>32))
	}
}
