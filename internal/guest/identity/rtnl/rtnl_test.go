package rtnl

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestBroadcast(t *testing.T) {
	for in, want := range map[string]string{
		"10.99.0.5/16": "10.99.255.255", "10.0.2.15/24": "10.0.2.255", "1.2.3.4/32": "1.2.3.4", "1.2.3.4/31": "1.2.3.5", "1.2.3.4/0": "255.255.255.255",
	} {
		if got := broadcast(netip.MustParsePrefix(in)); got.String() != want {
			t.Errorf("%s: %v, want %s", in, got, want)
		}
	}
}

// header makes a netlink message.
func header(kind, flags uint16, seq uint32, body []byte) []byte {
	b := make([]byte, 16, 16+len(body))
	nb := nativeBytes
	copy(b, nb(uint32(16+len(body))))
	b[4], b[5], b[6], b[7] = byte(kind), byte(kind>>8), byte(flags), byte(flags>>8)
	copy(b[8:], nb(seq))
	b = append(b, body...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func nativeBytes(v uint32) []byte { return attribute32(nil, 0, v)[4:] }

func TestAnswer(t *testing.T) {
	ack := header(unix.NLMSG_ERROR, 0, 7, make([]byte, 20))
	if list, done, err := answer(ack, 7); err != nil || !done || len(list) != 0 {
		t.Errorf("ack: %v, %t, %v", list, done, err)
	}
	if _, done, err := answer(ack, 8); err != nil || done {
		t.Errorf("another request's ack: %t, %v", done, err)
	}
	errno := unix.ENODEV
	fail := append(nativeBytes(uint32(-int32(errno))), make([]byte, 16)...)
	fail = attribute(fail, unix.NLMSGERR_ATTR_MSG, []byte("no such thing\x00"))
	_, done, err := answer(header(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, 7, fail), 7)
	if !done || !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "(no such thing)") {
		t.Errorf("failure: %t, %v", done, err)
	}
	if _, _, err := answer(ack[:10], 7); !errors.Is(err, errShort) {
		t.Errorf("cut: %v", err)
	}
}

func FuzzAnswer(f *testing.F) {
	link := attribute(linkBody(3, unix.IFF_UP, 0), unix.IFLA_IFNAME, []byte("eth0\x00"))
	f.Add(header(unix.RTM_NEWLINK, unix.NLM_F_MULTI, 1, link))
	f.Add(header(unix.RTM_NEWADDR, 0, 1, addressBody(2, netip.MustParsePrefix("10.0.0.1/8"))))
	f.Add(header(unix.NLMSG_ERROR, 0, 1, []byte{1, 2}))
	f.Add([]byte{20, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _, _ := answer(b, 1)
		for _, m := range list {
			parseLink(m)
			parseAddress(m)
			parseRoute(m)
			neighbour(m, 1)
		}
	})
}
