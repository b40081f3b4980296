package ext4

// dirTail is the false entry at the end of each directory block that holds
// its checksum.
const dirTail = 12

// lostFoundBlocks gives e2fsck names to use before it must allocate: 16 KiB,
// as mke2fs has it.
const lostFoundBlocks = 4

// dirBlocks lays the entries of d out in blocks and gives each block to emit.
// The block is used again for the next.
func (d *node) dirBlocks(least int, emit func([]byte) error) error {
	const room = BlockSize - dirTail
	b := make([]byte, BlockSize)
	off, last, done := 0, 0, 0
	flush := func() error {
		if off == 0 { // an entry of no file over the whole block
			le.PutUint16(b[4:], room)
		} else {
			le.PutUint16(b[last+4:], uint16(room-last))
		}
		le.PutUint16(b[room+4:], dirTail)
		b[room+7] = 0xDE
		if err := emit(b); err != nil {
			return err
		}
		clear(b)
		off, last = 0, 0
		done++
		return nil
	}
	add := func(name string, n *node) error {
		size := (8 + len(name) + 3) &^ 3
		if off+size > room {
			if err := flush(); err != nil {
				return err
			}
		}
		e := b[off:]
		le.PutUint32(e, n.ino)
		le.PutUint16(e[4:], uint16(size))
		e[6], e[7] = byte(len(name)), fileType(n.mode)
		copy(e[8:], name)
		last = off
		off += size
		return nil
	}
	if err := add(".", d); err != nil {
		return err
	}
	if err := add("..", d.parent); err != nil {
		return err
	}
	for _, name := range d.names() {
		if err := add(name, d.children[name].n); err != nil {
			return err
		}
	}
	for off > 0 || done < least {
		if err := flush(); err != nil {
			return err
		}
	}
	return nil
}
