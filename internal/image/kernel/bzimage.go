package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// Offsets in the x86 boot protocol's setup header
// (Documentation/arch/x86/boot.rst). payload_offset counts from the start of
// the protected-mode code, which follows the boot sector and setup_sects more.
const (
	offSetupSects    = 0x1f1
	offHeaderMagic   = 0x202
	offVersion       = 0x206
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	setupHeaderEnd   = 0x250

	headerMagic = "HdrS"
	// payloadVersion is the first protocol that has the payload fields.
	payloadVersion = 0x0208
	sector         = 512
	// maxVmlinux bounds what a payload may unpack to; Debian's is 53 MB.
	maxVmlinux = 512 << 20
)

// errNotBzImage reports a file that is no bzImage.
var errNotBzImage = errors.New("not an x86 bzImage")

// Compressions of a payload by their first bytes, as the kernel's own
// scripts/extract-vmlinux tells them apart.
var payloadMagics = []struct {
	name  string
	magic string
	open  func(io.Reader) (io.Reader, error)
}{
	{"gzip", "\x1f\x8b\x08", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{"xz", "\xfd7zXZ\x00", func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) }},
	{"zstd", "\x28\xb5\x2f\xfd", openZstd},
	// Debian's choice, in lz4's "legacy" frame; the library tells frames apart.
	{"lz4", "\x02\x21\x4c\x18", func(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil }},
	{"none", "\x7fELF", func(r io.Reader) (io.Reader, error) { return r, nil }},
}

func openZstd(r io.Reader) (io.Reader, error) {
	d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxVmlinux))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}

// extractVmlinux unpacks the ELF kernel inside a bzImage. The guest would
// otherwise do it at every boot, which under TCG takes seconds.
func extractVmlinux(image []byte) ([]byte, error) {
	if len(image) < setupHeaderEnd || string(image[offHeaderMagic:offHeaderMagic+4]) != headerMagic {
		return nil, errNotBzImage
	}
	le := binary.LittleEndian
	if v := le.Uint16(image[offVersion:]); v < payloadVersion {
		return nil, fmt.Errorf("boot protocol %d.%02d is too old: it does not say where the kernel is", v>>8, v&0xff)
	}
	sects := int64(image[offSetupSects])
	if sects == 0 {
		sects = 4 // the protocol's default for the oldest loaders
	}
	start := (sects+1)*sector + int64(le.Uint32(image[offPayloadOffset:]))
	length := int64(le.Uint32(image[offPayloadLength:]))
	if length == 0 || start+length > int64(len(image)) {
		return nil, fmt.Errorf("payload of %d bytes at %d is outside the file of %d bytes", length, start, len(image))
	}
	return decompressPayload(image[start : start+length])
}

func decompressPayload(payload []byte) ([]byte, error) {
	for _, p := range payloadMagics {
		if !bytes.HasPrefix(payload, []byte(p.magic)) {
			continue
		}
		out, err := decompress(p.name, payload, p.open)
		if err != nil {
			return nil, fmt.Errorf("unpack %s payload: %w", p.name, err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("payload starts with % x: its compression is not known (gzip, xz, zstd and lz4 are)", payload[:min(6, len(payload))])
}

// decompress unpacks a payload. All but gzip's are followed by the size of what
// is inside, four bytes little endian (scripts/Makefile.lib, size_append), which
// a decompressor that expects another frame would choke on.
func decompress(name string, payload []byte, open func(io.Reader) (io.Reader, error)) ([]byte, error) {
	var size int64 = -1
	if name != "none" && len(payload) > 4 {
		// gzip's own trailer ends in the same number.
		size = int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
		if name != "gzip" {
			payload = payload[:len(payload)-4]
		}
	}
	if size > maxVmlinux {
		return nil, fmt.Errorf("says that it unpacks to %d bytes", size)
	}
	r, err := open(bytes.NewReader(payload))
	if err != nil {
		return nil, err
	}
	if c, ok := r.(io.Closer); ok {
		defer c.Close()
	}
	var buf bytes.Buffer
	if size > 0 {
		buf.Grow(int(size))
	}
	n, err := io.Copy(&buf, io.LimitReader(r, maxVmlinux+1))
	if err != nil {
		return nil, err
	}
	if n > maxVmlinux || size >= 0 && n != size {
		return nil, fmt.Errorf("unpacked to %d bytes, should be %d", n, size)
	}
	return buf.Bytes(), nil
}
