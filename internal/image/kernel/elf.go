package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
)

const (
	// phys32Entry is XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h):
	// the PVH entry point, which QEMU's -kernel jumps to.
	phys32Entry = 18
	// mmioMarker names the platform driver that CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES
	// registers (drivers/virtio/virtio_mmio.c).
	mmioMarker = "virtio-mmio-cmdline"
	// maxNotes bounds a note section; a kernel's is under 1 KiB.
	maxNotes = 1 << 20
)

// vmlinuxFacts is what a kernel's ELF file tells about itself.
type vmlinuxFacts struct {
	Release string // uname -r; "" if it could not be found
	PVH     bool
	// MMIOCmdline: virtio devices can be named on the command line, so that
	// ACPI is not needed to find them.
	MMIOCmdline bool
}

// errNotELF reports a file that is no x86-64 ELF kernel.
var errNotELF = errors.New("not an x86-64 ELF kernel")

var bannerRE = regexp.MustCompile(`Linux version ([0-9][0-9A-Za-z.+~_-]{1,64}) \(`)

// inspectVmlinux reads facts from a kernel's bytes.
func inspectVmlinux(image []byte) (vmlinuxFacts, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return vmlinuxFacts{}, fmt.Errorf("%w: %w", errNotELF, err)
	}
	if f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		return vmlinuxFacts{}, fmt.Errorf("%w: it is for %v", errNotELF, f.Machine)
	}
	facts := vmlinuxFacts{MMIOCmdline: bytes.Contains(image, []byte(mmioMarker))}
	if m := bannerRE.FindSubmatch(image); m != nil {
		facts.Release = string(m[1])
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(io.LimitReader(p.Open(), maxNotes))
		if err != nil {
			return vmlinuxFacts{}, fmt.Errorf("read notes: %w", err)
		}
		if hasNote(notes, f.ByteOrder, "Xen", phys32Entry) {
			facts.PVH = true
		}
	}
	return facts, nil
}

// hasNote looks for a note in a PT_NOTE segment: three words (lengths of name
// and description, type), then both, each padded to four bytes.
func hasNote(b []byte, order binary.ByteOrder, name string, typ uint32) bool {
	for len(b) >= 12 {
		nameLen, descLen := uint64(order.Uint32(b)), uint64(order.Uint32(b[4:]))
		got := order.Uint32(b[8:])
		b = b[12:]
		end := pad4(nameLen) + pad4(descLen)
		if nameLen > uint64(len(b)) || end > uint64(len(b)) {
			return false
		}
		if got == typ && string(bytes.TrimRight(b[:nameLen], "\x00")) == name {
			return true
		}
		b = b[end:]
	}
	return false
}

func pad4(n uint64) uint64 { return (n + 3) &^ 3 }
