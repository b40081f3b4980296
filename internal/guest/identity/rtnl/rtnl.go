// Package rtnl speaks the part of rtnetlink(7) that gives a machine its network
// identity: one interface's hardware address, MTU, addresses and default route.
//
// It is written by hand because a netlink library would be a notable part of
// the agent: the binary must stay small. It does not watch for changes and
// knows nothing of policy; package identity decides what to set.
//
// A Conn belongs to the network namespace of the thread that opened it, and to
// one goroutine at a time.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// answerLimit bounds the wait for one answer. The kernel answers within the
	// system call unless another holds the network's lock.
	answerLimit = 5 * time.Second
	// maxMessages bounds one dump: a guest can have many interfaces and routes.
	maxMessages = 100_000
	// maxDatagram is the largest answer that the kernel sends.
	maxDatagram = 64 << 10
)

var errShort = errors.New("netlink message is cut short")

// Conn is a netlink socket.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Open opens a socket in the calling thread's network namespace.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	limit := unix.NsecToTimeval(answerLimit.Nanoseconds())
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
	)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	// Only for better error texts; since Linux 4.12.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return &Conn{fd: fd, buf: make([]byte, maxDatagram)}, nil
}

// Close closes the socket.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// message is one netlink message without its header.
type message struct {
	kind uint16
	data []byte
}

// do sends a request that is answered with an acknowledgement.
func (c *Conn) do(kind, flags uint16, body []byte) error {
	_, err := c.exchange(kind, flags|unix.NLM_F_ACK, body)
	return err
}

// dump sends a request for a list.
func (c *Conn) dump(kind uint16, body []byte) ([]message, error) {
	return c.exchange(kind, unix.NLM_F_DUMP, body)
}

func (c *Conn) exchange(kind, flags uint16, body []byte) ([]message, error) {
	c.seq++
	req := make([]byte, 0, unix.SizeofNlMsghdr+len(body))
	req = binary.NativeEndian.AppendUint32(req, uint32(unix.SizeofNlMsghdr+len(body)))
	req = binary.NativeEndian.AppendUint16(req, kind)
	req = binary.NativeEndian.AppendUint16(req, flags|unix.NLM_F_REQUEST)
	req = binary.NativeEndian.AppendUint32(req, c.seq)
	req = binary.NativeEndian.AppendUint32(req, 0)
	req = append(req, body...)
	if err := unix.Sendto(c.fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("send netlink request: %w", err)
	}
	var list []message
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive netlink answer: %w", err)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not from the kernel
		}
		more, done, err := answer(c.buf[:n], c.seq)
		if err != nil {
			return nil, err
		}
		if list = append(list, more...); len(list) > maxMessages {
			return nil, fmt.Errorf("netlink answer has more than %d parts", maxMessages)
		}
		if done {
			return list, nil
		}
	}
}

// answer parses one datagram that answers request seq. The messages' data is
// copied.
func answer(b []byte, seq uint32) (list []message, done bool, err error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return nil, false, errShort
		}
		size := binary.NativeEndian.Uint32(b)
		kind := binary.NativeEndian.Uint16(b[4:])
		flags := binary.NativeEndian.Uint16(b[6:])
		if size < unix.SizeofNlMsghdr || uint64(size) > uint64(len(b)) {
			return nil, false, errShort
		}
		data := b[unix.SizeofNlMsghdr:size]
		mine := binary.NativeEndian.Uint32(b[8:]) == seq
		b = b[min(align(int(size)), len(b)):]
		if !mine {
			continue // of a request that was given up
		}
		switch kind {
		case unix.NLMSG_DONE:
			return list, true, errnoOf(data, flags)
		case unix.NLMSG_ERROR:
			if len(data) < 4 {
				return nil, false, errShort
			}
			return list, true, errnoOf(data, flags)
		case unix.NLMSG_NOOP:
		case unix.NLMSG_OVERRUN:
			return nil, false, unix.ENOBUFS
		default:
			list = append(list, message{kind, append([]byte(nil), data...)})
		}
	}
	return list, false, nil
}

// errnoOf reads the error of an acknowledgement, with the kernel's own words
// when there are any.
func errnoOf(data []byte, flags uint16) error {
	if len(data) < 4 {
		return nil
	}
	n := int32(binary.NativeEndian.Uint32(data))
	if n >= 0 {
		return nil
	}
	errno := unix.Errno(-n)
	if flags&unix.NLM_F_ACK_TLVS != 0 && len(data) > 4+unix.SizeofNlMsghdr {
		for typ, v := range attributes(data[4+unix.SizeofNlMsghdr:]) {
			if typ == unix.NLMSGERR_ATTR_MSG {
				return fmt.Errorf("%w (%s)", errno, text(v))
			}
		}
	}
	return errno
}

func align(n int) int { return (n + 3) &^ 3 }

// attributes yields the attributes in b; a malformed rest is left out.
func attributes(b []byte) func(yield func(uint16, []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(binary.NativeEndian.Uint16(b))
			typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if size < unix.SizeofRtAttr || size > len(b) || !yield(typ, b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// attribute appends one attribute.
func attribute(b []byte, typ uint16, v []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(v)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, v...)
	return append(b, make([]byte, align(len(v))-len(v))...)
}

func attribute32(b []byte, typ uint16, v uint32) []byte {
	return attribute(b, typ, binary.NativeEndian.AppendUint32(nil, v))
}

// text is a string attribute without its closing zero.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
