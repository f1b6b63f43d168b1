//go:build tools

// Keeps the daemon among this module's requirements: see ../../get_daemon.py.
package tools

import _ "github.com/libp2p/go-libp2p-daemon/p2pd"
