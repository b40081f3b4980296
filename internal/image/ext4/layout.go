package ext4

import (
	"encoding/binary"
	"hash/crc32"
)

// BlockSize is the file system's block size in bytes.
const BlockSize = 4096

const (
	groupBlocks   = 8 * BlockSize // one bitmap block's worth: 128 MiB
	groupBytes    = groupBlocks * BlockSize
	descSize      = 64
	descsPerBlock = BlockSize / descSize
	// gdtBlocks are set aside after every superblock: 256 blocks of 64
	// descriptors are 16384 groups, 2 TiB.
	gdtBlocks    = 256
	maxGroups    = gdtBlocks * descsPerBlock
	superBlocks  = 1 + gdtBlocks // of a group with a superblock
	addrPerBlock = BlockSize / 4

	// journalBlocks is 32 MiB. mke2fs gives a 10 GiB disk 64 MiB; but the
	// journal is what every workspace's own layer ends up holding in full.
	journalBlocks = 8192

	inodeSize      = 256
	inodesPerBlock = BlockSize / inodeSize
	inodeExtra     = 32 // bytes of the second half in use: up to i_projid
	// defaultInodesPerGroup is one inode for 16 KiB, as mke2fs has it.
	defaultInodesPerGroup = 8192
	maxInodesPerGroup     = 8 * BlockSize

	rootIno      = 2
	resizeIno    = 7
	journalIno   = 8
	lostFoundIno = 11 // the first that is not reserved

	maxNameLen   = 255
	maxLinks     = 65000
	maxSymlink   = BlockSize - 1
	maxFastLink  = 59 // stored in the inode
	maxExtentLen = 32768
)

// File type bits of st_mode.
const (
	modeFIFO    = 0o010000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeType    = 0o170000
)

// fileType is the type byte of a directory entry.
func fileType(mode uint32) byte {
	switch mode & modeType {
	case modeRegular:
		return 1
	case modeDir:
		return 2
	case modeChar:
		return 3
	case modeBlock:
		return 4
	case modeFIFO:
		return 5
	case modeSymlink:
		return 7
	}
	return 0
}

// hasSuper reports whether group g keeps a copy of superblock and
// descriptors: 0, 1 and the powers of 3, 5 and 7 (sparse_super).
func hasSuper(g int64) bool {
	if g <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

var (
	le  = binary.LittleEndian
	be  = binary.BigEndian
	tab = crc32.MakeTable(crc32.Castagnoli)
)

// crc continues ext4's checksum: CRC-32C without the usual inversions.
func crc(seed uint32, p ...[]byte) uint32 {
	for _, b := range p {
		seed = ^crc32.Update(^seed, tab, b)
	}
	return seed
}

func le32(v uint32) []byte { return le.AppendUint32(nil, v) }
func le64(v uint64) []byte { return le.AppendUint64(nil, v) }

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }
