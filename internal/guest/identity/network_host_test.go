//go:build host

package identity

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/internal/guest/identity/rtnl"
)

// inNamespaces runs fn on a thread of its own with private network and UTS
// namespaces; the thread is thrown away.
func inNamespaces(t *testing.T, fn func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWUTS)
		defer func() { done <- err }() // also when fn calls t.Fatal
		if err == nil {
			fn()
		}
	}()
	if err := <-done; err != nil {
		t.Skipf("missing capability: namespaces: %v", err)
	}
}

// ip runs iproute2 in the calling thread's namespace.
func ip(t *testing.T, args string) string {
	if _, err := exec.LookPath("ip"); err != nil {
		t.Error("missing capability: ip")
		return ""
	}
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		t.Errorf("ip %s: %v: %s", args, err, out)
	}
	return string(out)
}

// state is what the interface has, by iproute2, a second opinion.
func state(t *testing.T, name string) string {
	return ip(t, "-o link show "+name) + ip(t, "-o addr show dev "+name) + ip(t, "route show") + ip(t, "-6 route show default") + ip(t, "neigh show dev "+name)
}

func TestNetworkIdentity(t *testing.T) {
	s, _ := newTest(t, Options{Interface: "eth0"})
	s.sys.setHostname = func(n string) error { return unix.Sethostname([]byte(n)) }
	inNamespaces(t, func() {
		ip(t, "link add eth0 type veth peer name peer0")
		ip(t, "link set peer0 up")
		ip(t, "link set eth0 up")
		ip(t, "addr add 192.168.7.7/24 dev eth0")
		ip(t, "addr add 192.168.7.8/24 dev eth0") // goes with the first
		ip(t, "addr add fd99::9/64 dev eth0 nodad")
		ip(t, "route add default via 192.168.7.1 metric 50")
		ip(t, "route add 172.16.0.0/12 via 192.168.7.1")
		ip(t, "neigh add 192.168.7.1 lladdr 02:00:00:00:00:99 dev eth0 nud reachable")
		ip(t, "link add vpn0 type bridge")
		ip(t, "link set vpn0 up")
		ip(t, "route add default dev vpn0 metric 900")

		configure := func(m *guestv1.ConfigureRequest) {
			if _, err := s.Configure(t.Context(), connect.NewRequest(m)); err != nil {
				t.Fatal(err)
			}
		}
		check := func(want, not []string) {
			got := state(t, "eth0")
			for _, w := range want {
				if !strings.Contains(got, w) {
					t.Errorf("no %q in\n%s", w, got)
				}
			}
			for _, w := range not {
				if strings.Contains(got, w) {
					t.Errorf("%q in\n%s", w, got)
				}
			}
		}
		configure(complete())
		check([]string{"link/ether 52:54:00:12:34:56", "mtu 1400", "inet 10.99.0.5/16 brd 10.99.255.255 scope global eth0",
			"default via 10.99.0.1 dev eth0", "default dev vpn0", "fd99::9/64", "fe80::5054:ff:fe12:3456/64"}, []string{"192.168.7", "neigh", "02:00:00:00:00:99"})
		if h, err := os.Hostname(); err != nil || h != "ws-abc12345" {
			t.Errorf("host name %q, %v", h, err)
		}
		lo, err := net.InterfaceByName("lo")
		if err != nil || lo.Flags&net.FlagUp == 0 {
			t.Errorf("loopback %v, %v", lo, err)
		}

		// The same again changes nothing.
		before := state(t, "eth0")
		configure(complete())
		if after := state(t, "eth0"); after != before {
			t.Errorf("from\n%s\nto\n%s", before, after)
		}

		m := complete()
		m.Address, m.Gateway, m.Dns, m.Mac = "fd00::5/64", "fd00::1", nil, ""
		configure(m)
		check([]string{"inet6 fd00::5/64", "default via fd00::1 dev eth0", "inet 10.99.0.5/16", "52:54:00:12:34:56"}, []string{"fd99::9", "tentative"})

		// A gateway alone, and one that does not fit what is there.
		m = withoutNetwork()
		m.Gateway = "10.99.0.2"
		configure(m)
		check([]string{"default via 10.99.0.2 dev eth0"}, []string{"10.99.0.1 "})
		ip(t, "addr flush dev eth0")
		_, err = s.Configure(t.Context(), connect.NewRequest(m))
		wantError(t, err, connect.CodeFailedPrecondition, "gateway", "eth0 has no address of its family")
	})
}

// TestMACThatNeedsTheInterfaceDown does what a driver needs that refuses to
// change its address while it is up. None of this kernel's virtual ones does.
func TestMACThatNeedsTheInterfaceDown(t *testing.T) {
	inNamespaces(t, func() {
		conn, err := rtnl.Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		ip(t, "tuntap add dev eth0 mode tap")
		ip(t, "link set eth0 up")
		ip(t, "addr add 10.1.0.2/24 dev eth0")
		ip(t, "route add default via 10.1.0.1 dev eth0 onlink")
		ip(t, "addr add fd01::2/64 dev eth0 nodad")
		ip(t, "route add default via fd01::1 dev eth0")
		links, err := conn.Links()
		if err != nil {
			t.Error(err)
			return
		}
		i := slices.IndexFunc(links, func(l rtnl.Link) bool { return l.Name == "eth0" })
		if i < 0 || links[i].Kind != "tun" || !links[i].Ethernet || !links[i].Up {
			t.Errorf("links %+v", links)
			return
		}
		n := &nic{conn: conn, link: links[i]}
		if err := n.setMACDown(net.HardwareAddr{0x52, 0x54, 0, 0, 0, 7}); err != nil {
			t.Error(err)
		}
		got := state(t, "eth0")
		for _, want := range []string{"52:54:00:00:00:07", "UP", "10.1.0.2/24", "default via 10.1.0.1", "fd01::2/64", "default via fd01::1"} {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in\n%s", want, got)
			}
		}
	})
}

func TestFindsTheDevice(t *testing.T) {
	inNamespaces(t, func() {
		ip(t, "link add br0 type bridge")
		_, err := openNIC("", &request{address: netip.MustParsePrefix("10.0.0.2/8")})
		if err == nil || err.Error() != "address: not possible in this guest: the machine has no network interface" {
			t.Errorf("a virtual interface was taken: %v", err)
		}
		n, err := openNIC("br0", &request{address: netip.MustParsePrefix("10.0.0.2/8")})
		if err != nil || n.link.Name != "br0" {
			t.Errorf("%+v, %v", n, err)
			return
		}
		n.close()
	})
}

// TestManyNeighboursAndAddresses reads dumps of several datagrams.
func TestManyNeighboursAndAddresses(t *testing.T) {
	inNamespaces(t, func() {
		ip(t, "link add eth0 type bridge")
		ip(t, "link set eth0 up")
		var batch strings.Builder
		for i := range 3000 {
			fmt.Fprintf(&batch, "addr add 10.%d.%d.1/24 dev eth0\n", i/200, i%200)
			if i < 400 { // the kernel keeps 1024
				fmt.Fprintf(&batch, "neigh add 11.0.%d.%d lladdr 02:00:00:00:00:01 dev eth0 nud stale\n", i/200, i%200)
			}
		}
		cmd := exec.Command("ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(batch.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %.300s", err, out)
			return
		}
		s, _ := newTest(t, Options{Interface: "eth0"})
		m := withoutNetwork()
		m.Address = "10.99.0.5/16"
		if _, err := s.Configure(t.Context(), connect.NewRequest(m)); err != nil {
			t.Error(err)
		}
		if got := state(t, "eth0"); strings.Count(got, "inet ") != 1 || strings.Contains(got, "11.0.") {
			t.Errorf("%.500s", got)
		}
	})
}
